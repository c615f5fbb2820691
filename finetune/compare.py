"""What a plan said and what a training then took, side by side: `compare(plan, train)`.

Both are the plain values of plan.json and train.json, so that a stage, the report and a test can ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from finetune.memory import ADAPTER, AT_REST, OPTIMIZER, TRAINED_WEIGHTS

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure, planned and measured."""

    name: str
    """What it is."""
    planned: float
    """What the plan said."""
    measured: float
    """What was measured."""
    unit: str
    """Unit of both."""
    how: str
    """What was compared with what."""

    @property
    def error(self) -> float:
        """Planned over measured, less one: 0.05 is five per cent too much. Infinite where nothing was measured."""
        if self.measured == 0:
            return 0.0 if self.planned == 0 else float("inf")
        return self.planned / self.measured - 1

    def as_json(self) -> dict[str, Any]:
        """The row as plain values, `error` too (None where it is infinite)."""
        return asdict(self) | {"error": self.error if isfinite(self.error) else None}

    def sentence(self) -> str:
        """The row as a line: `weights at rest: planned 0.287 GiB, measured 0.287 GiB (+0.1 %)`."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: planned {self.planned:.4g}{unit}, measured {self.measured:.4g}{unit} ({self.error:+.1%})"


def compare(plan: Mapping[str, Any], train: Mapping[str, Any]) -> list[Row]:
    """A row for everything that the plan of a run says and its training has measured; older files have fewer."""
    planned = {figure["name"]: figure["value"] for figure in plan["memory"]}
    listed = [figure for group in ("work", "cost") if group in plan for figure in plan[group]]
    work = {figure["name"]: figure["value"] for figure in listed}
    rows = []

    def row(name: str, said: Iterable[str], measured: float, how: str) -> None:
        known = [planned[part] for part in said if part in planned]
        if known:
            rows.append(Row(name=name, planned=sum(known), measured=measured, unit="GiB", how=how))

    whole = TRAINED_WEIGHTS in planned
    at_rest = [name for name in planned if name.startswith(AT_REST)]
    trained = sum(group["trainable"] for group in train["coverage"])
    spread = "distribution" in train and train["distribution"] == "fsdp2"  # each process then holds its part
    if not whole and not spread:
        row(
            "weights at rest",
            at_rest,
            train["resident_gib"],
            "parameters and buffers of the base, 4-bit scales included",
        )
    if not spread:
        row(
            "what is trained",
            (ADAPTER, TRAINED_WEIGHTS),
            trained * 4 / GIB,
            "trainable parameters that were counted, 4 B",
        )
    if "optimizer_gib" in train and not spread:
        row("optimizer", (OPTIMIZER,), train["optimizer_gib"], "tensors of its state after the last update")
    on_gpu = str(train["device"]) != "cpu"
    peak = [name for name in planned if name != "memory" and not (on_gpu and name == "reserve")]
    of = "of the GPU's allocator, the plan's reserve left out" if on_gpu else "of the whole process, libraries included"
    row("peak while training", peak, train["peak_memory_gib"], of)
    for name, unit, measured, how in (
        ("steps", "updates", len(train["steps"]), "updates of the run"),
        ("tokens", "tokens", train["tokens"], "padding not counted"),
        ("hours", "h", train["seconds"] / 3600, "of the updates alone"),
    ):
        if name in work and measured:
            rows.append(Row(name=name, planned=work[name], measured=measured, unit=unit, how=how))
    return rows
