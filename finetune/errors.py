"""Errors that are the user's to mend: an id, what, why, and what to type. They end the program without a traceback.

Whatever they are told, they say it without the secrets in it (`guard.redact`): other programs' words, addresses.
"""

from __future__ import annotations

from typing import Any

from finetune.guard import redact


class FinetuneError(Exception):
    """A mistake or a missing thing that the user can mend. `exit_code` is what the command line returns."""

    exit_code = 3

    def __init__(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, redact(what), redact(why), redact(fix)
        super().__init__(self.sentence())

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        """So that it comes whole out of a worker process."""
        return type(self), (self.code, self.what, self.why, self.fix)

    def sentence(self) -> str:
        """`ID what: why. Try: fix`, on one line unless it lists several problems."""
        listed = "\n" in self.what  # a list of problems; what follows stands on lines of its own
        text = f"{self.code} {self.what}"
        if self.why:
            text += f"\n{self.why}" if listed else f": {self.why}"
        text = text if listed and not self.why else text.rstrip(".") + "."
        return text + ("\n" if listed else " ") + f"Try: {self.fix}" if self.fix else text

    def _render_traceback_(self) -> list[str]:
        """The sentence alone: what IPython and its notebooks print in place of a traceback (their documented hook)."""
        return self.sentence().splitlines()


class RecipeError(FinetuneError):
    """Settings that cannot work; carries every problem found, not the first one."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = [redact(problem) for problem in problems]
        Exception.__init__(self, "\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """So that it comes whole out of a worker process."""
        return type(self), (self.problems,)

    def sentence(self) -> str:
        """All problems, one a line."""
        return "\n".join(self.problems)


class RunError(FinetuneError):
    """A run folder that is missing, busy, unfinished or cannot be written."""


class DataError(FinetuneError):
    """Rows or cards that cannot be used."""

    exit_code = 2


class WeightsError(FinetuneError):
    """A base model whose files are missing, damaged or not what the recipe says."""


class AdapterError(FinetuneError):
    """An adapter folder that cannot be read, or not without guessing."""

    exit_code = 2


class NumbersError(FinetuneError):
    """A loss or gradient that is not finite, or an adapter that did not train."""


class GateError(FinetuneError):
    """A finished stage whose result is below what the recipe demands."""

    exit_code = 4


class ServerError(FinetuneError):
    """A server that is missing, does not start, does not answer, or does not answer as one. `status` is HTTP's."""

    def __init__(self, code: str, what: str, why: str = "", fix: str = "", status: int = 0) -> None:
        self.status = status
        super().__init__(code, what, why, fix)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """So that it comes whole out of a worker process."""
        return type(self), (self.code, self.what, self.why, self.fix, self.status)


class Preempted(FinetuneError):
    """Training stopped early on request, with a checkpoint. Exit code 75: the same command again goes on."""

    exit_code = 75

    def __init__(self, signal: str, step: int, steps: int) -> None:
        self.signal, self.step, self.steps = signal, step, steps
        super().__init__("TRN-005", f"stopped by {signal} after step {step} of {steps}", "the checkpoint is whole", "")

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """So that it comes whole out of a worker process."""
        return type(self), (self.signal, self.step, self.steps)
