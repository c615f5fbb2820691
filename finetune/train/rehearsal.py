"""The longest batch and a save before step 1, without a trace: what does not fit ends a run at once, not hours later.

`Rehearsal` is a callback. On a GPU the whole batch is tried. On a CPU the system would kill the process instead of
raising an error, so parts of the batch come first. What they grow by says whether the rest is tried: not when it cannot
fit, and not when a quarter of the rows says that twice as much as the whole needs would fit.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from finetune.base import Peak, resident_gib
from finetune.disk import states_at_most
from finetune.errors import FinetuneError
from finetune.failures import out_of_memory
from finetune.machine import available_gib, room
from finetune.ranks import Ranks
from finetune.recipe import Recipe
from finetune.rundir import RunDir

MOMENTS = 2
"""Numbers that AdamW keeps per trained parameter."""
STATE_BYTES = 4 + 4 * MOMENTS
"""Bytes of a training state per trained parameter."""


class Rehearsal(TrainerCallback):
    """Tries the longest training and evaluation batch and a save when training begins; `trainer` must be set before."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, console: Console, ranks: Ranks | None = None) -> None:
        self.recipe, self.run_dir, self.console = recipe, run_dir, console
        self.ranks = ranks or Ranks()
        self.trainer: Any = None
        self.measured: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises FinetuneError: MEM-001 when a batch or a save does not fit, DSK-003 when the disk has no room."""
        if not self.recipe.train.rehearse_memory:
            return
        started = time.monotonic()
        check_disk(self.run_dir, kwargs["model"], self.recipe)
        with no_trace(self.trainer, kwargs["model"]), self.trainer.without_updates():
            self.measured = self._rehearse(kwargs["model"])
        seconds = time.monotonic() - started
        self.measured["seconds"] = round(seconds, 2)
        some = "" if self.measured["tried_rows"] == self.measured["rows"] else f"{self.measured['tried_rows']} rows of "
        self.console.print(
            f"rehearsed {some}the longest batch ({self.measured['rows']} x {self.measured['tokens']} tokens) in "
            f"{seconds:.1f} s: it takes {room(self.measured['growth_gib'])} of {room(self.measured['free_gib'])} free",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _rehearse(self, model: Any) -> dict[str, Any]:
        trainer, meter = self.trainer, Meter()
        meter.free_gib = min(self.ranks.gather(meter.free_gib))  # else processes could try other batches and wait
        row = longest_row(trainer.train_dataset)
        rows, tokens = trainer.args.per_device_train_batch_size, len(row["input_ids"])
        what = f"longest batch ({rows} x {tokens} tokens)"
        grown: list[tuple[int, float]] = []
        tried = 0
        with meter.refusing(what, self.recipe):
            standing = moments(model, trainer.optimizer)
            for some_rows, some_tokens in parts(rows, tokens, whole=meter.on_gpu):
                if len(grown) > 1:
                    expected = max(self.ranks.gather(predicted(grown, some_rows * some_tokens)))
                    meter.refuse_above(expected, what, self.recipe)
                    if tried and some_rows == rows and 2 * expected <= meter.free_gib:
                        meter.gib = expected
                        break
                with meter:
                    train_once(trainer, cut(row, some_tokens), some_rows)
                grown.append((some_rows * some_tokens, meter.gib))
                tried = some_rows if some_tokens == tokens else 0  # rows of full length
            meter.refuse_above(meter.gib, what, self.recipe)
        for dataset in evaluation_sets(trainer):
            row, rows = longest_row(dataset), trainer.args.per_device_eval_batch_size
            what = f"longest evaluation batch ({rows} x {len(row['input_ids'])} tokens)"
            with meter.refusing(what, self.recipe), meter:
                batch = trainer.data_collator([row] * rows)
                trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)
        less = smaller(self.recipe)
        with meter.refusing("a save", self.recipe, less):
            saved = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**30
            if not meter.on_gpu:
                # What the process that writes needs more: the moments once more, and as bytes; the weights as bytes.
                needed = meter.held_gib() + (2 * MOMENTS + 1) * saved if self.ranks.first else 0.0
                meter.refuse_above(max(self.ranks.gather(needed)), "a save", self.recipe, less)
            with meter:
                trainer.rehearse_save(standing)
        del standing
        return {
            "rows": trainer.args.per_device_train_batch_size,
            "tokens": tokens,
            "tried_rows": tried,
            "growth_gib": round(meter.gib, 3),
            "free_gib": round(meter.free_gib, 3),
        }


class Meter:
    """What memory grew by since the meter was made, at most, within its `with` blocks; and what was free then."""

    def __init__(self) -> None:
        import torch

        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**30
            self.free_gib, self.all_gib = (size / 2**30 for size in torch.cuda.mem_get_info())
        else:
            self._before, self.free_gib = resident_gib(), available_gib()
            self.all_gib = self._before + self.free_gib
        self.gib = 0.0

    def __enter__(self) -> None:
        self._peak = Peak()
        self._peak.__enter__()

    def __exit__(self, *_: object) -> None:
        import torch

        self._peak.__exit__()
        now = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else self._peak.gib
        self.gib = max(self.gib, now - self._before)

    def held_gib(self) -> float:
        """What host memory has grown by as it is now."""
        return resident_gib() - self._before

    def refuse_above(self, growth_gib: float, what: str, recipe: Recipe, change: str = "") -> None:
        """Raises MEM-001 when memory would grow by more than was free."""
        if growth_gib > self.free_gib:
            peak = f"peaks at {room(self._before + growth_gib)} of {room(self.all_gib)}"
            raise too_little(what, peak, recipe, change)

    @contextmanager
    def refusing(self, what: str, recipe: Recipe, change: str = "") -> Iterator[None]:
        """Whatever says in the block that memory ran out becomes MEM-001."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            peak = room(self._before + self.gib)
            raise too_little(what, f"needs more than {peak} of {room(self.all_gib)}", recipe, change) from error


def too_little(what: str, how_much: str, recipe: Recipe, change: str = "") -> FinetuneError:
    """MEM-001 with `change`, or with the mildest settings with which a batch needs less."""
    train, data = recipe.train, recipe.data
    if change:
        pass
    elif train.batch_size > 1:
        fewer = train.batch_size // 2
        more = -(-train.accumulation * train.batch_size // fewer)
        change = f"train.batch_size={fewer} train.accumulation={more}"
    elif not train.gradient_checkpointing:
        change = "train.gradient_checkpointing=true"
    else:
        change = f"data.max_length={data.max_length // 2}"
    return FinetuneError("MEM-001", f"{what} {how_much}", "training would fail when it comes to it", change)


def smaller(recipe: Recipe) -> str:
    """Settings with which less is trained, and saved."""
    return "adapter=lora" if recipe.adapter.method == "full" else "adapter.rank=8 adapter.expert_rank=4"


def check_disk(run_dir: RunDir, model: Any, recipe: Recipe) -> None:
    """Raises FinetuneError (DSK-003) when the run's disk has no room for the adapter and the states that will be kept.

    Those that are there already, of a training that goes on, do not count.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = max(1, states_at_most(recipe.train) - len(list(run_dir.checkpoints.glob("step-*"))))
    each = 4 + states * STATE_BYTES
    needed, free = trained * each / 2**30, shutil.disk_usage(run_dir.path).free / 2**30
    if needed > free:
        raise FinetuneError(
            "DSK-003",
            f"{run_dir.path}: adapter and training states take {room(needed)}, free are {room(free)}",
            f"{trained:,} trained parameters x {each} B, {states} states",
            f"train.keep_checkpoints=1, runs_dir=/folder on another disk, or {smaller(recipe)}",
        )


def longest_row(dataset: Any) -> dict[str, Any]:
    """The row with most tokens. Lengths are read from the Arrow columns, not row by row."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(dataset.with_format("arrow").select_columns(["input_ids"])[:].column("input_ids"))
    row: dict[str, Any] = dataset[int(pc.index(lengths, pc.max(lengths)).as_py())]
    return row


def cut(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The last `tokens` of a row, where the answer is, in every column of tokens."""
    full = len(row["input_ids"])
    return {
        name: value[full - tokens :] if isinstance(value, list) and len(value) == full else value
        for name, value in row.items()
    }


def parts(rows: int, tokens: int, *, whole: bool) -> list[tuple[int, int]]:
    """(rows, tokens) of the batches to try, the last one whole.

    On a CPU smaller ones come first: two pieces of a row, then always a quarter of the rows before four times as many,
    since what a small batch takes says little of a much larger one.
    """
    if whole:
        return [(1, max(1, tokens // 8)), (rows, tokens)]  # so that gradients are there, as when batches accumulate
    quarters = [rows]
    while quarters[-1] >= 4:
        quarters.append(quarters[-1] // 4)
    pieces = [(1, max(1, tokens // 8)), (1, max(1, tokens // 4))]
    return list(dict.fromkeys([*pieces, *((some, tokens) for some in reversed(quarters))]))


def predicted(grown: list[tuple[int, float]], tokens: int) -> float:
    """Growth of a batch of so many tokens, in GiB, on the line through the last two (tokens, growth): at least that.

    What does not grow with the batch (a library's first call) is in both points and so in no slope.
    """
    (few, low), (more, high) = grown[-2:]
    return high + (high - low) / max(1, more - few) * (tokens - more)


def moments(model: Any, optimizer: Any) -> list[Any]:
    """What the optimizer will keep, allocated and written to, so that it is really there; nothing if it has it already.

    The optimizer itself is not touched.
    """
    import torch

    if optimizer is not None and optimizer.state:
        return []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is not None:  # its parameters may be parts of them
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [torch.ones_like(parameter) for parameter in trained for _ in range(MOMENTS)]


def train_once(trainer: Any, row: dict[str, Any], rows: int) -> None:
    """Forward and backward of a batch of equal rows, as the trainer does them; the gradients stay."""
    batches, count = trainer.get_batch_samples(iter([trainer.data_collator([row] * rows)]), 1, trainer.args.device)
    trainer.training_step(trainer.model_wrapped, batches[0], count)


def evaluation_sets(trainer: Any) -> list[Any]:
    """The sets that are evaluated while training, none, one or several."""
    sets = trainer.eval_dataset
    if sets is None:
        return []
    return list(sets.values()) if isinstance(sets, dict) else [sets]


@contextmanager
def no_trace(trainer: Any, model: Any) -> Iterator[None]:
    """Puts everything back that a forward and backward pass changes: the same seed trains the same with and without.

    These are the states of random numbers, gradients, modes, what our experts count, and what trainers count for their
    logs: TRL (1.14.2) adds up tokens and metrics of every batch in plain attributes of the trainer.
    """
    import numpy as np
    import torch

    draws = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    counted = {
        name: copy.deepcopy(value)
        for name, value in vars(trainer).items()
        if isinstance(value, int | float) or name in ("_metrics", "update")
    }
    modes = [(module, module.training) for module in model.modules()]
    heard = [(m, getattr(m, "finetune_heard", None)) for m in model.modules() if hasattr(m, "finetune_layout")]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        torch.set_rng_state(draws[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
        vars(trainer).update(counted)
        for module, training in modes:
            module.training = training
        for module, rows in heard:
            if rows is not None:
                module.finetune_heard = rows
            elif hasattr(module, "finetune_heard"):
                del module.finetune_heard
