"""Training: what is counted, what is refused, and that the same seed gives the same adapter."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.compose import load_recipe
from finetune.errors import NumbersError, RunError
from finetune.progress import Guard
from finetune.recipe import Adapter, Train
from finetune.run import carry_on, run
from finetune.rundir import read_json
from finetune.train.learnt import unlearnt
from finetune.train.settings import arithmetic, loss_type, planned_steps
from finetune.train.state import trainable
from tests.tiny_models import adapted, some_ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """words -> the run of a rehearsal up to training, each in its own folder."""
    root = tmp_path_factory.mktemp("runs")

    def make(*words):
        recipe = load_recipe(
            "legal_quickstart", "scale=rehearsal", f"runs_dir={root}", f"cache_dir={root / 'cache'}", *words
        )
        return run(recipe, until="train")

    return make


@pytest.fixture(scope="module")
def plain(trained):
    """The run without a word more."""
    return trained()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(trained):
    first, again, other = trained("seed=3"), trained("seed=3"), trained("seed=4")
    file = "adapter_model.safetensors"
    assert (first.adapter / file).read_bytes() == (again.adapter / file).read_bytes()
    assert (first.adapter / file).read_bytes() != (other.adapter / file).read_bytes()
    a, b = (read_json(r.train)["steps"] for r in (first, again))
    assert [s["loss"] for s in a] == [s["loss"] for s in b]


def test_accumulating_two_halves_equals_one_batch_in_fp32(trained):
    """The same rows per update: the token-weighted mean over both halves is the mean over the whole."""
    one = trained("train.batch_size=4", "train.precision=fp32", "adapter.load_in_4bit=false")
    two = trained("train.batch_size=2", "train.accumulation=2", "train.precision=fp32", "adapter.load_in_4bit=false")
    for a, b in zip(read_json(one.train)["steps"], read_json(two.train)["steps"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


def test_gradient_checkpointing_changes_no_loss(trained, plain):
    recomputed = trained("train.gradient_checkpointing=true")
    a, b = (read_json(r.train)["steps"] for r in (plain, recomputed))
    assert [s["loss"] for s in a] == pytest.approx([s["loss"] for s in b], abs=1e-6)


def test_the_saved_adapter_is_fp32_and_names_its_base(plain):
    assert {t.dtype for t in load_file(plain.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    config = read_json(plain.adapter / "adapter_config.json")
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert "all-linear" not in str(config["target_modules"])
    assert str(plain.path.parent) not in str(config)  # no path of this machine


def test_a_learning_rate_that_blows_up_stops_the_run_and_leaves_no_adapter(trained):
    with pytest.raises(NumbersError, match=r"NUM-001 (loss|grad_norm) is (nan|inf)"):
        trained("train.lr=1e30", "train.max_grad_norm=1e30", "train.max_steps=12", "train.warmup_fraction=0")


def test_a_held_out_loss_that_is_no_number_stops_the_run_before_it_is_saved(trained):
    words = ("train.lr=1e30", "train.max_grad_norm=1e30", "train.warmup_fraction=0", "train.max_steps=6")
    with pytest.raises(NumbersError, match=r"NUM-001 the held-out loss is (nan|inf) at step 1: .* Try: a lower train"):
        trained(*words, "train.evaluate_steps=1", "train.save_steps=2")


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [(Train(batch_size=8), 720, 90), (Train(batch_size=8, epochs=2), 9, 3), (Train(max_steps=5), 1000, 5)],
)
def test_planned_steps(settings, rows, steps):
    assert planned_steps(settings, rows) == steps


def test_the_arithmetic_is_shown():
    text = arithmetic(Train(batch_size=2, accumulation=4), 64, 10)
    assert "1 device x 2 rows x 4 accumulated = 8 rows per update" in text
    assert "10 updates x 8 = 80 rows, 1.25 x 64" in text


def _unlearnt(model):
    return unlearnt(model, trainable(model))


def test_an_adapter_that_did_not_move_is_refused_unless_its_expert_met_no_token():
    base, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    idle, heard = _unlearnt(model)
    assert idle == {}
    assert set(heard) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert all(rows == [0, 0, 0, 0] for rows in heard.values())
    parameters = dict(model.named_parameters())
    stack = next(n for n in parameters if ".experts.base_layer.lora_B" in n)
    with torch.no_grad():
        b = parameters[stack]
        b.view(b.shape[0], -1, 4)[:, :, 2] = 0  # expert-minor: expert 2 of the first stack
    assert _unlearnt(model)[0] == {"model.layers.0.mlp.experts.gate_up_proj": [2]}
    ids = some_ids(base)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(NumbersError, match=r"TRN-004 gate_up_proj of .*layers\.0.* experts \[2\] got gradients"):
        _unlearnt(model)
    attention = next(n for n in parameters if "q_proj" in n and "lora_B" in n)
    with torch.no_grad():
        parameters[attention].zero_()
    with pytest.raises(NumbersError, match="TRN-002"):
        _unlearnt(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_with_a_gradient_are_counted_once_per_expert(checkpointing):
    base, model = adapted("qwen3_moe", Adapter(rank=2, expert_rank=2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ids = some_ids(base)
    labels = ids.clone()
    labels[:, :-4] = -100
    model.train()(input_ids=ids, labels=labels).loss.backward()
    heard = _unlearnt(model)[1]
    layers = [heard[name] for name in sorted(heard)]
    assert sum(layers[0]) == ids.numel() * 2 - 4  # nobody reads the last token, whose two experts get no gradient
    assert sum(layers[-1]) == 2 * 4 * 2  # below the head only the positions whose answer is trained
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert _unlearnt(model)[1] == heard


def test_the_best_state_is_kept_and_becomes_the_adapter_and_measuring_it_changes_nothing(trained):
    words = ("train.max_steps=8", "train.save_steps=3", "train.lr=1.0", "train.schedule=constant_with_warmup")
    words = (*words, "train.precision=fp32")  # the same losses on every CPU
    measured = trained(*words, "train.evaluate_steps=1", "train.adapter_of=best", "train.keep_checkpoints=1")
    told = read_json(measured.train)
    losses = {entry["step"]: entry["loss"] for entry in told["heldout"]}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(1, 9))
    assert best != 8, "this learning rate was to overshoot"
    assert told["adapter_of_step"] == best
    assert {p.name for p in measured.checkpoints.glob("step-*")} == {f"step-{best:06d}", "step-000008"}
    saved = load_file(measured.checkpoints / f"step-{best:06d}" / "weights.safetensors")
    adapter = load_file(measured.adapter / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name.replace(".default", "")], tensor) for name, tensor in saved.items())
    plain = read_json(trained(*words).train)
    assert [s["loss"] for s in plain["steps"]] == [s["loss"] for s in told["steps"]]


def test_a_damaged_or_missing_best_state_is_no_adapter_and_the_last_one_is_had_by_what_is_told(trained):
    words = ("train.max_steps=8", "train.save_steps=3", "train.lr=1.0", "train.schedule=constant_with_warmup")
    words = (*words, "train.precision=fp32", "train.evaluate_steps=1", "train.adapter_of=best")
    done = trained(*words)
    best = done.checkpoints / f"step-{read_json(done.train)['adapter_of_step']:06d}"
    shutil.rmtree(done.adapter)
    file = best / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    for damage in ("weights.safetensors has other bytes than were written", "manifest.json is missing"):
        with pytest.raises(RunError, match=f"CKP-006 {best}: {damage}: train.adapter_of=best: ") as refused:
            carry_on(done, until="train")
        assert not done.adapter.exists()
        shutil.rmtree(best, ignore_errors=True)
    told = re.search(r"Try: python -m finetune (run=.*?), for", refused.value.sentence())[1]
    assert main(["train", *told.split()]) == 0
    assert read_json(done.train)["adapter_of_step"] == 8


def test_recomputing_fewer_layers_changes_no_loss_and_says_how_many(trained, plain, capsys):
    some = trained("train.gradient_checkpointing=true", "train.checkpointed_layers=1")
    assert "recomputing activations in 1 of 2 layers: train.checkpointed_layers" in capsys.readouterr().out
    a, b = (read_json(r.train)["steps"] for r in (plain, some))
    assert [s["loss"] for s in a] == pytest.approx([s["loss"] for s in b], abs=1e-6)


def test_a_kind_of_weight_without_a_gradient_is_named_at_step_one():
    _, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if "q_proj" in name else torch.ones_like(parameter)
    state = type("State", (), {"global_step": 0})()
    with pytest.raises(NumbersError, match=r"TRN-001 no gradient reaches \['.*q_proj'\]"):
        Guard().on_pre_optimizer_step(None, state, None, model=model)


def test_only_a_class_whose_backbone_is_itself_computes_all_logits_at_once():
    _, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    assert loss_type(model.get_base_model()) == "chunked_nll"
    _, model = adapted("llama4", Adapter(rank=2, expert_rank=2))
    assert loss_type(model.get_base_model()) == "nll"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("adapter=dora", "adapter.lora_plus_ratio=4"),
        ("adapter.init=pissa", "adapter.rslora=true", "adapter.rank_pattern={down_proj: 4}"),
        ("train.optimizer=adamw_8bit", "train.neftune_alpha=5", "adapter.alpha_pattern={q_proj: 8}"),
        ("adapter.init=orthogonal", "train.optimizer=lion", "train.router_aux_loss_coef=0.01"),
        ("adapter=full", "adapter.router=true", "train.router_aux_loss_coef=0.01"),
        ("adapter=full", "model=gpt_oss_20b", "adapter.targets=experts", "train.gradient_checkpointing=true"),
    ],
    ids=lambda words: " ".join(words),
)
def test_each_way_to_tune_goes_the_whole_way_to_an_export(words, tmp_path, forked_proofs):
    recipe = load_recipe(
        "qwen3_30b_legal", "scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", *words
    )
    done = run(recipe)
    scores, parity = read_json(done.scores), read_json(done.export / "parity.json")
    assert scores["base"]["loss"] != scores["tuned"]["loss"]
    assert parity["mean_kl"] < 0.01
    assert done.report.is_file() and done.record.is_file()
    assert done.tuned.exists() == ("adapter=full" in words) != done.adapter.exists()
