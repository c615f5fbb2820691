"""What a person watches while an adapter trains: the bar, the lines, and the tokens that they count."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from finetune.errors import NumbersError
from finetune.progress import TokenCounter, TrainingProgress, duration, is_tenth, note, real_tokens
from finetune.recipe import Adapter
from tests.tiny_models import adapted, some_ids

ONE = SimpleNamespace(world_size=1)


def watched(console: Console, total: int, model: torch.nn.Module | None = None, stop: int | None = None) -> list[dict]:
    """The logs of a run of `total` steps, as callbacks after the progress see them."""
    seen = []
    with TrainingProgress(console, total) as progress:
        state = SimpleNamespace(global_step=0)
        progress.on_train_begin(ONE, state, None, model=model or torch.nn.Linear(1, 1))
        for step in range(1, (stop or total) + 1):
            state.global_step = step
            seen.append({"loss": 2.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0})
            progress.on_log(ONE, state, None, logs=seen[-1])
    return seen


def test_without_a_terminal_there_is_a_line_every_tenth_with_all_figures():
    page = io.StringIO()
    watched(Console(file=page, width=60), 200)
    lines = page.getvalue().splitlines()
    steps = [int(re.match(r"step (\d+)/200 ", line).group(1)) for line in lines]
    assert steps == [1, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200]
    figures = r"step \d+/200  loss \d\.\d{3}  [\d,]+ tokens/s  left \d+:\d\d:\d\d  peak \d+\.\d GiB"
    assert all(re.fullmatch(figures, line) for line in lines)


def test_a_terminal_has_a_bar_with_the_same_figures_and_it_ends_with_an_error():
    page = io.StringIO()
    console = Console(file=page, width=160, force_terminal=True)
    watched(console, 5)
    shown = page.getvalue()
    assert "5/5" in shown and "loss 0.400" in shown and "tokens/s" in shown and "left 0:00:00" in shown
    assert "step 1/5" not in shown
    page.truncate(0)
    progress = TrainingProgress(console, 5)
    with pytest.raises(NumbersError), progress:
        progress.on_train_begin(ONE, SimpleNamespace(global_step=0), None, model=torch.nn.Linear(1, 1))
        raise NumbersError("NUM-001", "loss is nan")
    assert page.getvalue().count("\x1b[?25l") == page.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_a_quiet_console_shows_nothing_even_on_a_terminal():
    page = io.StringIO()
    assert len(watched(Console(file=page, quiet=True, force_terminal=True), 20)) == 20
    assert page.getvalue() == ""


def test_later_callbacks_find_speed_and_memory_in_the_logs():
    logs = watched(Console(quiet=True), 3)
    assert all(entry["tokens_per_second"] == 0 and 0 < entry["peak_memory_gib"] < 1000 for entry in logs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_are_those_of_training_batches_without_padding_once(checkpointing):
    base, model = adapted("mixtral", Adapter(rank=2, expert_rank=2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    counter = TokenCounter()
    counter.watch(model)
    ids = some_ids(base, rows=3, length=11)
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 2:] = 0, 0
    for _ in range(2):
        model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=mask)
    assert counter.take() == 2 * (11 + 7 + 2)
    assert counter.take() == 0
    counter.close()
    model.train()(input_ids=ids, attention_mask=mask)
    assert counter.take() == 0


def test_of_packed_sequences_the_padding_is_not_counted():
    from finetune.data.packing import PackedBatch

    rows = [
        {"input_ids": [7, 8, 9, 7, 8], "labels": [-100, 8, -100, 7, 8], "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [7, 0, 9], "labels": [-100, 0, 9], "position_ids": [0, 1, 2]},  # 0, the padding, as a real token
    ]
    found = real_tokens(PackedBatch(pad=0)(rows))
    assert found.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_the_time_left_is_the_pace_of_recent_steps_without_the_first():
    steps = [{"step": n, "loss": 1.0, "seconds": 100.0 if n == 1 else 2.0, "tokens": 50} for n in range(1, 6)]
    assert note(steps, 3605, 1.25) == "loss 1.000  25 tokens/s  left 2:00:00  peak 1.2 GiB"
    assert duration(59.6) == "0:01:00"
    assert [n for n in range(1, 8) if is_tenth(n, 7)] == [1, 2, 3, 4, 5, 6, 7]
