"""The picture of `bench_experts.py`: bytes resident, peak and seconds per step, side by side."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

COLOURS = {
    "ours": "#0b6e4f",
    "stock-4bit": "#e0a030",
    "stock-bf16": "#b5482f",
    "stock-fp32": "#7a3b8f",
    "unsloth": "#5566aa",
}
PANELS = (
    ("resident_bytes", 2**30, "weights resident, GiB", ("workload",)),
    ("step_peak_bytes", 2**30, "peak while training, GiB", ("workload", "tokens", "routing")),
    ("seconds_median", 1, "seconds per step", ("workload", "tokens", "routing")),
)
"""Figure of a row, what it is divided by, title, and what tells one group of bars from the next."""


def draw(figures: dict[str, Any], target: Path) -> None:
    """Writes the picture of a benchmark's figures as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sides = [name for name in COLOURS if any(row["side"] == name for row in figures["rows"])]
    groups = len({(row["workload"], row["tokens"], row["routing"]) for row in figures["rows"]})
    figure = Figure(figsize=(max(11, 3 * groups), 3.6), dpi=150, layout="constrained")
    for axes, (key, unit, title, labels) in zip(figure.subplots(1, 3), PANELS, strict=True):
        found: dict[tuple[Any, ...], list[float]] = {}  # (cell, side) -> values; ours has one beside each stock side
        for row in figures["rows"]:
            if key in row:
                cell = tuple(row[name] for name in labels)
                found.setdefault((cell, row["side"]), []).append(row[key] / unit)
        cells = list(dict.fromkeys(cell for cell, _ in found))
        width = 0.8 / len(sides)
        for (cell, side), values in found.items():
            height = median(values)
            at = cells.index(cell) + (sides.index(side) - (len(sides) - 1) / 2) * width
            axes.bar(at, height, width * 0.92, color=COLOURS[side])
            axes.text(at, height, f"{height:.3g}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(cells)), [label(*cell) for cell in cells], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    patches = [Patch(color=COLOURS[side], label=side) for side in sides]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(sides), frameon=False, fontsize=9)
    about = figures["machine"]
    where = about["cpu"] if about["device"] == "cpu" else about["device"]
    figure.suptitle(f"LoRA on experts: {where}, {about['date']}", fontsize=10)
    figure.savefig(target)


def label(workload: str, tokens: int = 0, routing: str = "own") -> str:
    """What stands below the bars of a cell."""
    return "\n".join([workload, *([f"{tokens} tokens"] if tokens else []), *([routing] if routing != "own" else [])])
