"""What a person watches while the adapter trains, and what stops a run whose numbers have gone wrong."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from finetune.errors import NumbersError
from finetune.ranks import Ranks

RECENT = 20
"""Updates over which speed and the time left are measured."""


class TrainingProgress(TrainerCallback):
    """Loss, tokens per second, time left and memory: a bar on a terminal, a line every tenth of the run elsewhere.

    Keeps every step's numbers, and puts speed and memory into the logs, so that callbacks after it (trackers) have
    them. A quiet console, which ranks other than the first have, shows nothing. Ends with the `with` block.
    """

    def __init__(self, console: Console, total: int, ranks: Ranks | None = None) -> None:
        self.console, self.total, self.ranks = console, total, ranks or Ranks()
        self.steps: list[dict[str, Any]] = []
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._counter = TokenCounter()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._counter.close()
        if self._bar:
            self._bar.stop()  # a bar that is left running hides the cursor
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar and the count of tokens."""
        self._counter.watch(kwargs["model"])
        self._last = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=self.console, expand=True)  # the bar gives way to the figures
            self._task = self._bar.add_task("training", total=self.total, completed=state.global_step, note="")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Notes one step's numbers."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        step = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "seconds": round(now - self._last, 3),
            "tokens": sum(self.ranks.gather(self._counter.take())),
        }
        self._last = now
        self.steps.append(step)
        logs["tokens_per_second"] = round(tokens_per_second(self.steps[-1:]), 1)
        logs["peak_memory_gib"] = round(peak_memory_gib(), 3)
        text = note(self.steps, self.total, logs["peak_memory_gib"])
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, note=text)
        elif is_tenth(state.global_step, self.total):
            self.console.print(f"step {state.global_step}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def memory(self) -> list[dict[str, Any]]:
        """The steps, for a checkpoint."""
        return list(self.steps)

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Takes up the steps of a checkpoint."""
        self.steps = list(memory)


class TokenCounter:
    """Counts the tokens of the batches that a model is trained with, without padding, on the model's device.

    Where a batch has an `attention_mask` its ones are counted; a packed batch has none, and what is not counted is the
    end of a sequence that begins with position 0 and has no label. Recomputed and evaluated batches are not counted.
    """

    def __init__(self) -> None:
        self._sum: Any = 0
        self._hook: Any = None

    def watch(self, model: Any) -> None:
        """Counts from now on, in the model that the trainer calls (a wrapper for several devices calls it in turn)."""
        self.close()
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self) -> int:
        """The tokens since the last call. Called where the loss has just been read: nothing waits for the device."""
        count, self._sum = int(self._sum), 0
        return count

    def close(self) -> None:
        """Ends the count."""
        if self._hook:
            self._hook.remove()
            self._hook = None

    def _count(self, model: Any, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if model.training:
            self._sum = self._sum + real_tokens(batch).sum()


def real_tokens(batch: dict[str, Any]) -> Any:
    """(rows, length) of True for every token of a batch that is not padding, on its device."""
    import torch

    if "attention_mask" in batch and batch["attention_mask"] is not None:
        return batch["attention_mask"] != 0
    if "position_ids" not in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    index = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    last_begin = (index * (batch["position_ids"] == 0)).amax(1, keepdim=True)
    trained = ((batch["labels"] != -100) & (index >= last_begin)).any(1, keepdim=True)
    return trained | (index < last_begin)


def note(steps: list[dict[str, Any]], total: int, memory_gib: float) -> str:
    """What is said of the last of some steps: `loss 1.234  5,678 tokens/s  left 0:12:34  peak 3.2 GiB`."""
    recent = steps[-RECENT:]
    if len(recent) > 1 and recent[0] is steps[0]:
        recent = recent[1:]  # the first step also warms up
    left = (total - steps[-1]["step"]) * sum(step["seconds"] for step in recent) / len(recent)
    return (
        f"loss {steps[-1]['loss']:.3f}  {tokens_per_second(recent):,.0f} tokens/s  left {duration(left)}  "
        f"peak {memory_gib:.1f} GiB"
    )


def tokens_per_second(steps: list[dict[str, Any]]) -> float:
    """Tokens, padding left out, of all processes in a second of some steps."""
    return sum(step["tokens"] for step in steps) / max(1e-9, sum(step["seconds"] for step in steps))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def is_tenth(step: int, total: int) -> bool:
    """Whether a line is due where there is no terminal: at the first and last step and at every tenth of the run."""
    return step in (1, total) or step * 10 // total > (step - 1) * 10 // total


def peak_memory_gib() -> float:
    """Highest memory of this process: of the GPU when there is one, else resident host memory, in GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Guard(TrainerCallback):
    """After the first backward pass, every kind of trained weight must have received a gradient."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises NumbersError (TRN-001) naming the kinds of weights without a gradient at step 1."""
        if state.global_step == 0:
            require_gradients(kwargs["model"])


def require_gradients(model: Any, gradient: Callable[[Any], Any] = attrgetter("grad")) -> None:
    """Nothing, or NumbersError (TRN-001) naming the kinds of trained weights whose `gradient(weight)` is none or zero.

    It is asked for every weight, in the same order in every process: it may gather what several of them hold.
    """
    heard: dict[str, bool] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = any(".lora_" in name for name in trained)
    for name, parameter in trained.items():
        if ".lora_B." in name or not adapted:  # A's gradient is zero while B is zero
            kind = ".".join(part for part in name.partition(".lora_B.")[0].split(".") if not part.isdigit())
            found = gradient(parameter)
            heard[kind] = heard.get(kind, False) or (found is not None and bool(found.any()))
    silent = sorted(kind for kind, any_gradient in heard.items() if not any_gradient)
    if silent or not heard:
        what = f"no gradient reaches {silent or 'any weight'}"
        raise NumbersError("TRN-001", what, "", "report this with the recipe")
