"""A training that is ready to run: what its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.ranks import Ranks
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.train.learnt import Heard


@dataclass(kw_only=True, slots=True)
class Job:
    """Base, adapter, rows and trainer of one process."""

    recipe: Recipe
    """What the run is to do."""
    run_dir: RunDir
    """Where it writes."""
    ranks: Ranks
    """This process among the others."""
    base: Any
    """The frozen base (`finetune.base.Base`)."""
    trainer: Any
    """`train.trainer.Trainer`."""
    rows: Any
    """The training rows, or the sequences they are packed into."""
    steps: int
    """Optimizer updates of the whole run."""
    table: list[dict[str, Any]]
    """The coverage table."""
    progress: Any
    """Numbers of every step."""
    boundary: Any
    """What the processes agree on between updates."""
    router: Any
    """Tokens per expert."""
    rehearsal: Any
    """What the longest batch took."""
    heard: Heard
    """Rows with a gradient per expert."""
    begun: dict[str, Any]
    """Name -> fingerprints of the weights before the first update, of full fine-tuning."""
    resumed: Resumed
    """Where the run went on."""
    console: Any
    """Where the first process prints; of others nothing is seen."""


class Resumed:
    """Every time the run went on from a checkpoint."""

    def __init__(self) -> None:
        self.earlier: list[dict[str, Any]] = []
        self.now: dict[str, Any] | None = None

    def memory(self) -> list[dict[str, Any]]:
        """All of them, for a checkpoint."""
        return [*self.earlier, *([self.now] if self.now else [])]

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Takes up those before this one."""
        self.earlier = list(memory)
