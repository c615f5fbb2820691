"""Errors that are the user's to mend: an id, what, why, and what to type. They end the program without a traceback."""

from __future__ import annotations


class FinetuneError(Exception):
    """A mistake or a missing thing that the user can mend. `exit_code` is what the command line returns."""

    exit_code = 3

    def __init__(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        self.code, self.what, self.why, self.fix = code, what, why, fix
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """`ID what: why. Type: fix`, on one line."""
        text = f"{self.code} {self.what}"
        if self.why:
            text += f": {self.why}"
        text = text.rstrip(".") + "."
        return f"{text} Try: {self.fix}" if self.fix else text


class RecipeError(FinetuneError):
    """Settings that cannot work; carries every problem found, not the first one."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        Exception.__init__(self, "\n".join(problems))

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
