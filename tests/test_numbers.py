"""Numbers that went wrong: seen at once, with the rows they are of, and before anything is saved."""

import json
import os

import pytest
import torch

from finetune.data import PackedBatch
from finetune.errors import NumbersError, Preempted
from finetune.ranks import Ranks
from finetune.run import carry_on
from finetune.rundir import read_json
from finetune.stop import Request
from finetune.train.batch import DIGEST, NUMBER, Numbered, digest, hex_of
from finetune.train.identity import changes
from finetune.train.order import Order
from finetune.train.trainer import Boundary
from tests.trained import prepared

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2], NUMBER: 4},
    {"input_ids": [8, 9], "labels": [-100, 9], "position_ids": [0, 1], NUMBER: 2},
]


def test_a_batch_says_which_rows_it_is_of_and_what_was_in_it():
    batch = Numbered(PackedBatch(0))(ROWS)
    assert batch[NUMBER].tolist() == [4, 2]
    plain = {name: value for name, value in batch.items() if name not in (NUMBER, DIGEST)}
    assert batch[DIGEST].tolist() == digest(plain).tolist()
    for name in plain:
        changed = dict(plain) | {name: plain[name] + torch.eye(2, 3, dtype=torch.int64)}
        assert digest(changed).tolist() != batch[DIGEST].tolist()
    assert hex_of([[1, 2, 3, 4], [5, 6, 7, 8]]) != hex_of([[5, 6, 7, 8], [1, 2, 3, 4]])


def test_a_batch_without_a_trained_token_is_refused_and_named():
    silent = [row | {"labels": [7] + [-100] * (len(row["labels"]) - 1)} for row in ROWS]  # nobody predicts the first
    with pytest.raises(NumbersError, match=r"TRN-006 a batch has no trained token: rows \[4, 2\]"):
        Numbered(PackedBatch(0))(silent)


def test_the_first_number_that_is_not_finite_names_its_rows_and_keeps_earlier_checkpoints(tmp_path):
    run_dir = prepared(
        tmp_path, "train.lr=1e30", "train.max_grad_norm=1e30", "train.max_steps=12", "train.warmup_fraction=0",
        "train.save_steps=1",
    )  # fmt: skip
    with pytest.raises(NumbersError) as caught:
        carry_on(run_dir, until="train")
    said = caught.value.sentence()
    step = int(said.split(" at step ")[1].split(",")[0])
    rows = said.split(" of rows ")[1].split(":")[0].split(", ")
    known = {json.loads(line)["row"] for line in (run_dir.data / "ledger.jsonl").read_text().splitlines()}
    assert set(rows) <= known
    assert len(rows) == 2
    assert [p.name for p in run_dir.checkpoints.glob("step-*")] == ([f"step-{step - 1:06d}"] if step > 1 else [])
    assert not run_dir.adapter.exists()


def test_every_update_has_a_digest_and_other_rows_have_another(tmp_path):
    one, other = (
        read_json(carry_on(prepared(tmp_path, f"seed={seed}", "train.max_steps=3"), until="train").train)["steps"]
        for seed in (3, 4)
    )
    digests = [[step["batch"] for step in steps] for steps in (one, other)]
    assert all(len(d) == 16 for steps in digests for d in steps)
    assert not set(digests[0]) & set(digests[1])


def test_a_request_that_came_while_loading_ends_training_before_its_first_step(tmp_path):
    request = Request()
    request.signal = "SIGUSR1"
    boundary = Boundary(Ranks(), request, lambda numbers: [], tmp_path / "batches.jsonl")
    state = type("State", (), {"global_step": 7, "max_steps": 9})()
    with pytest.raises(Preempted, match="TRN-005 stopped by SIGUSR1 after step 7 of 9"):
        boundary.on_train_begin(None, state, None)
    assert not boundary.log.exists()


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    lengths = [n % 7 for n in range(40)]
    for order, same, other in (
        (Order(40, 1), Order(40, 1), Order(40, 2)),
        (Order(40, 1, lengths, 4), Order(40, 1, lengths, 4), Order(40, 2, lengths, 4)),
    ):
        first, again = list(order), list(order)
        torch.rand(3)
        assert first == again == list(same)
        assert sorted(first) == list(range(40))
        assert list(other) != first
        order.epoch = 1
        assert list(order) != first
        assert len(order) == 40
    together = list(Order(40, 1, lengths, 4))
    spread = [
        max(lengths[n] for n in together[i : i + 4]) - min(lengths[n] for n in together[i : i + 4])
        for i in range(4, 40, 4)
    ]
    assert sum(spread) / len(spread) < 3


@pytest.mark.parametrize(
    ("name", "then", "now", "said"),
    [
        ("world_size", 2, 1, "world_size: 2 is now 1"),
        ("base", "a" * 64, "b" * 64, "base: other content"),
        ("versions", {"torch": "1", "trl": "2"}, {"torch": "3", "trl": "2"}, "versions: torch 1 is now 3"),
        ("seed", 17, 18, "seed: 17 is now 18"),
        ("precision", "bf16", "fp32", "precision: bf16 is now fp32"),
        ("settings", {"train.lr": 0.001}, {"train.lr": 0.002}, "settings: train.lr 0.001 is now 0.002"),
    ],
)
def test_what_differs_from_the_checkpoint_is_named_and_can_be_allowed(name, then, now, said):
    from finetune.check import CHANGEABLE
    from finetune.errors import RunError

    same = dict.fromkeys(CHANGEABLE, "x")
    with pytest.raises(RunError, match=f"CKP-002 .*{said}.*train.allow_changed=.{name}."):
        changes(same | {name: then}, same | {name: now}, [])
    assert changes(same | {name: then}, same | {name: now}, [name]) == {name: said.partition(": ")[2]}
    assert changes(same, same, []) == {}


def test_a_file_of_the_base_with_other_bytes_is_named(tmp_path):
    from finetune.errors import RunError
    from finetune.recipe import Recipe
    from finetune.record import note_inputs
    from finetune.rundir import RunDir, write_json
    from finetune.train.identity import identity

    recipe, run_dir, base = Recipe(), RunDir(tmp_path / "run"), tmp_path / "base"
    write_json(run_dir.data / "report.json", {"content_sha256": "c" * 64})
    base.mkdir()
    weights = base / "model.safetensors"
    weights.write_bytes(bytes(8) + b"header and bytes")
    (base / "config.json").write_text("{}")
    note_inputs(run_dir, recipe, base)
    then = identity(recipe, run_dir, base, 1)
    os.utime(weights, ns=(1, 1))
    assert identity(recipe, run_dir, base, 1) == then
    weights.write_bytes(bytes(8) + b"header and bytez")
    now = identity(recipe, run_dir, base, 1)
    with pytest.raises(RunError, match=r"CKP-002 .*base: other bytes .* in model.safetensors \(sha256 [0-9a-f]{12}\)"):
        changes(then, now, [])
    assert changes(then, now, ["base"]) and changes(now, identity(recipe, run_dir, base, 1), []) == {}


def test_what_one_process_and_two_differ_in_is_their_number():
    from finetune.check import CHANGEABLE

    then = dict.fromkeys(CHANGEABLE, "x") | {"world_size": 1, "distribution": "none"}
    now = then | {"world_size": 2, "distribution": "ddp"}
    assert changes(then, now, ["world_size"]) == {"world_size": "1 is now 2"}


def test_a_checkpoint_that_has_a_hash_of_its_settings_is_understood(tmp_path, monkeypatch):
    """The hash is that of finetune before the settings were named; made here as it was made there."""
    import dataclasses
    import hashlib
    import json

    from finetune.errors import RunError
    from finetune.recipe import Recipe
    from finetune.rundir import RunDir, write_json
    from finetune.train.identity import FREE, identity

    recipe, run_dir = Recipe(), RunDir(tmp_path)
    write_json(run_dir.data / "report.json", {"content_sha256": "c" * 64})
    training = {k: v for k, v in dataclasses.asdict(recipe.train).items() if k not in FREE}
    tree = {"adapter": dataclasses.asdict(recipe.adapter), "train": training, "packing": recipe.data.packing}
    now = json.loads(json.dumps(identity(recipe, run_dir, tmp_path, 1)))
    assert now["settings"]["train.lr"] == recipe.train.lr and "train.precision" not in now["settings"]
    then = now | {"settings": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()}
    assert changes(then, now, []) == {}
    recipe.train.lr *= 2
    with pytest.raises(RunError, match=r"CKP-002 .*settings: other content.*run=here train.allow_changed=.settings."):
        changes(then, identity(recipe, run_dir, tmp_path, 1), [], "here")
