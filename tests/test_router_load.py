"""How tokens are counted per expert, against the routers' own choices."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from finetune.adapters.coverage import plain_path
from finetune.adapters.targets import LAYER
from finetune.recipe import Adapter
from finetune.train.router_load import EVERY, RouterLoad, load
from tests.tiny_models import adapted, some_ids

LOGS = {"loss": 1.0}


def counted(router: RouterLoad, step: int = 1, last: int = 1) -> dict:
    """The readings at the end of a step."""
    logs = dict(LOGS)
    router.on_log(None, SimpleNamespace(global_step=step, max_steps=last), None, logs=logs)
    return logs


def chosen(model, family) -> dict[str, list[torch.Tensor]]:
    """Layer -> (tokens, top-k) of each call, noted where a block hands its routers' choice to its experts."""
    found: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        match = LAYER.search(plain_path(path))
        if match and match[2] == family.experts and hasattr(module, "finetune_layout"):
            notes = found.setdefault(plain_path(path), [])
            module.register_forward_pre_hook(lambda _, args, notes=notes: notes.append(args[1].detach().clone()))
    return found


@pytest.mark.parametrize("targets", ["experts", "attention"])
@pytest.mark.parametrize("family", ["mixtral", "llama4", "deepseek_v4", "gpt_oss", "qwen3_moe"])
def test_tokens_per_expert_are_the_routers_choices_without_padding(family, targets):
    base, model = adapted(family, Adapter(rank=2, expert_rank=2, targets=targets))
    notes = chosen(model, base.family)
    router = RouterLoad(Console(quiet=True))
    router.on_train_begin(None, None, None, model=model)
    ids = some_ids(base, rows=3, length=16)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    counted(router)
    summary = router.summary()
    assert set(summary) == set(notes) and len(notes) >= 2
    for layer, found in summary.items():
        (index,) = notes[layer]
        per_token = index.reshape(ids.numel(), -1)[mask.reshape(-1).bool()]
        assert found["tokens"] == torch.bincount(per_token.reshape(-1), minlength=len(found["tokens"])).tolist()
        assert sum(found["tokens"]) == int(mask.sum()) * base.model.config.num_experts_per_tok


def test_recomputed_and_evaluated_batches_are_not_counted():
    base, model = adapted("qwen3_moe", Adapter(rank=2, expert_rank=2))
    ids = some_ids(base)
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        notes = chosen(model, base.family)
        router = RouterLoad(Console(quiet=True))
        router.on_train_begin(None, None, None, model=model)
        for _ in range(2):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                model.eval()(input_ids=ids)
        counted(router)
        counts.append(router.summary())
        router.on_train_end(None, None, None)
        calls = {len(calls) for calls in notes.values()}
        assert calls == ({4} if not checkpointing else {6})  # recomputing really calls the experts again
    assert counts[0] == counts[1]
    assert all(sum(found["tokens"]) == 2 * ids.numel() * 2 for found in counts[0].values())
    model.train()(input_ids=ids, labels=ids)
    assert router.summary() == counts[1]  # the hooks are gone


def test_entropy_is_one_when_all_are_alike_and_zero_when_one_has_all():
    assert load([5, 5, 5, 5]) == {"entropy": 1.0, "busiest_share": 0.25, "dead": 0}
    assert load([0, 7, 0]) == {"entropy": 0.0, "busiest_share": 1.0, "dead": 2}
    assert load([1, 1, 0, 0])["entropy"] == pytest.approx(math.log(2) / math.log(4), abs=1e-4)
    assert load([3]) == {"entropy": 1.0, "busiest_share": 1.0, "dead": 0}


def test_experts_without_a_token_are_said_at_the_end_and_those_that_fell_silent_are_kept():
    base, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    page = io.StringIO()
    router = RouterLoad(Console(file=page, width=40))
    router.on_train_begin(None, None, None, model=model)
    ids = some_ids(base)
    experts = next(m for m in model.modules() if hasattr(m, "finetune_layout"))
    hooks = []

    def only(*allowed):
        """From now on the first layer's tokens go to these experts."""
        for hook in hooks:
            hook.remove()
        to = torch.tensor(allowed)
        hooks[:] = [
            experts.register_forward_pre_hook(
                lambda _, args: (args[0], to[torch.arange(args[1].numel()) % len(to)].view(args[1].shape), args[2]),
                prepend=True,
            )
        ]

    only(0, 1, 3)
    for step in range(1, 2 * EVERY + 1):
        if step == EVERY + 2:
            only(0, 1)
        model.train()(input_ids=ids)
        logs = counted(router, step, 2 * EVERY)
        assert ("router/model.layers.0.mlp.experts/entropy" in logs) == (step in (1, EVERY + 1, 2 * EVERY))
    router.on_train_end(None, None, None)
    first = router.summary()["model.layers.0.mlp.experts"]
    assert first["dead_experts"] == [2] and first["tokens"][2] == 0 and first["tokens"][3] > 0
    assert first["dead_lately"] == {"steps": EVERY - 1, "experts": [2, 3]}
    assert page.getvalue().startswith("warning: 1 of 8 experts got no token in the whole training, in 1 of 2 layers, ")
    assert "e.g. model.layers.0.mlp.experts: 2;" in page.getvalue() and page.getvalue().count("\n") == 1


def test_a_model_without_experts_has_no_counts():
    base, model = adapted("qwen3", Adapter(rank=2, targets="attention"))
    router = RouterLoad(Console(quiet=True))
    router.on_train_begin(None, None, None, model=model)
    ids = some_ids(base)
    model.train()(input_ids=ids)
    assert counted(router) == LOGS and router.summary() == {}
    router.on_train_end(None, None, None)


def rank_of_two(rank: int, meeting: str, results: str) -> None:
    """One of two processes; each counts other rows."""
    base, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    router = RouterLoad(Console(quiet=True))
    router.on_train_begin(None, None, None, model=model)
    model.train()(input_ids=some_ids(base, rows=2 + rank))
    counted(router)
    Path(f"{results}{rank}").write_text(json.dumps(router.summary()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_counts_of_two_processes_are_added_up(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "meeting"), str(tmp_path / "rank")), nprocs=2)
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second
    for found in json.loads(first).values():
        assert sum(found["tokens"]) == (2 + 3) * 19 * 2


def test_a_process_that_joins_a_training_reads_at_the_same_updates_as_the_others():
    """Each reading is a sum over all processes: one that read at another update would wait for ever."""
    base, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    routers = [RouterLoad(Console(quiet=True)) for _ in range(2)]
    for router in routers:
        router.on_train_begin(None, None, None, model=model)
    model.train()(input_ids=some_ids(base))
    for step in range(1, 6):
        counted(routers[0], step, 2 * EVERY)
    for step in range(6, 2 * EVERY + 1):
        read = ["router/model.layers.0.mlp.experts/entropy" in counted(router, step, 2 * EVERY) for router in routers]
        assert read == [step in (EVERY + 1, 2 * EVERY)] * 2
