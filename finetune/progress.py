"""What a person watches while the adapter trains, and what stops a run whose numbers have gone wrong."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finetune.errors import NumbersError


class TrainingProgress(TrainerCallback):
    """A bar with loss and speed on a terminal, a line every tenth of the run elsewhere; keeps every step's numbers."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.steps: list[dict[str, float]] = []
        self._last = time.monotonic()
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar."""
        self._last = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
            self._task = self._bar.add_task("training", total=self.total, note="")
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
        }
        self._last = now
        self.steps.append(step)
        note = f"loss {step['loss']:.3f}  {step['seconds']:.1f} s/step"
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, note=note)
        elif state.global_step % max(1, self.total // 10) == 0 or state.global_step in (1, self.total):
            self.console.print(f"step {state.global_step}/{self.total}  {note}")

    def memory(self) -> list[dict[str, float]]:
        """The steps, for a checkpoint."""
        return list(self.steps)

    def remember(self, memory: list[dict[str, float]]) -> None:
        """Takes up the steps of a checkpoint."""
        self.steps = list(memory)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the bar."""
        if self._bar:
            self._bar.stop()


class Guard(TrainerCallback):
    """After the first backward pass, every kind of adapted weight must have received a gradient."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises NumbersError (TRN-001) naming the kinds of weights without a gradient at step 1."""
        if state.global_step > 0:
            return
        heard: dict[str, bool] = {}
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad and ".lora_B." in name:  # A's gradient is zero while B is zero
                kind = ".".join(part for part in name.partition(".lora_B.")[0].split(".") if not part.isdigit())
                heard[kind] = heard.get(kind, False) or (parameter.grad is not None and bool(parameter.grad.any()))
        silent = sorted(kind for kind, any_gradient in heard.items() if not any_gradient)
        if silent or not heard:
            raise NumbersError(
                "TRN-001", f"no gradient reaches {silent or 'any adapter'}", "", "report this with the recipe"
            )
