"""`sweep.png`: tuned loss against the settings that a sweep changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.curves import ACCENT, INK, LINE, SOFT, new_figure, save_png, tidy

COLOURS = (ACCENT, "#c4572b", "#3b8a5a", "#8a5aa8", "#a88a2d", "#5a6472", "#c45a8f", "#2da0a8")
FAILED = "#b3261e"


@dataclass(frozen=True, slots=True)
class Point:
    """One job as the plot sees it."""

    settings: dict[str, str]
    """The settings in which it differs from the others."""
    loss: float
    """Tuned loss; infinity without one."""
    failed: bool
    """Whether it ended with an error."""


def draw_sweep(target: Path, points: Sequence[Point], base_losses: Sequence[float]) -> None:
    """One swept setting along the axis, a line for each value of a second one; more than two as bars.

    `base_losses` are those of the bases: one dashed line when they all have the same.
    """
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    if len(keys) in (1, 2) and all(set(point.settings) == set(keys) for point in points):
        figure, axes = new_figure(8, 5)
        _lines(axes, points, keys)
        axes.set_ylabel("tuned loss, nats per token")
        tidy(axes)
    else:
        figure, axes = new_figure(9, 1.4 + 0.4 * len(points))
        _bars(axes, points)
        axes.set_xlabel("tuned loss, nats per token")
    if len(base_losses) == 1:
        line = axes.axvline if len(keys) not in (1, 2) else axes.axhline
        line(base_losses[0], color=INK, linestyle="--", linewidth=1, label=f"base, {base_losses[0]:.3f}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    best = min(points, key=lambda point: point.loss)
    words = ", ".join(f"{key}={value}" for key, value in best.settings.items())
    axes.set_title(f"lowest: {best.loss:.4f} with {words}", loc="left", fontsize=11)
    save_png(figure, target)


def _lines(axes: Any, points: Sequence[Point], keys: list[str]) -> None:
    values = {key: list(dict.fromkeys(point.settings[key] for point in points)) for key in keys}
    along = max(keys, key=lambda key: (_numeric(values[key]), len(values[key])))
    others = [key for key in keys if key != along]
    place = _axis(axes, along, values[along])
    for number, value in enumerate(_ordered(values[others[0]]) if others else [""]):
        mine = [point for point in points if not others or point.settings[others[0]] == value]
        mine.sort(key=lambda point: place[point.settings[along]])
        scored = [point for point in mine if math.isfinite(point.loss)]
        axes.plot(
            [place[point.settings[along]] for point in scored],
            [point.loss for point in scored],
            color=COLOURS[number % len(COLOURS)],
            linestyle=("-", ":", "-.")[number // len(COLOURS) % 3],
            marker="o",
            markersize=6,
            linewidth=2 if _numeric(values[along]) else 0,
            label=f"{others[0]}={value}" if others else None,
        )
    lost = [place[point.settings[along]] for point in points if point.failed and not math.isfinite(point.loss)]
    if lost:  # at the top edge, whatever the losses are; two failed jobs at one place are one mark
        axes.plot(
            sorted(set(lost)),
            [0.97] * len(set(lost)),
            linestyle="none",
            marker="x",
            markersize=9,
            markeredgewidth=2,
            color=FAILED,
            transform=axes.get_xaxis_transform(),
            label="a job failed",
        )


def _axis(axes: Any, key: str, values: list[str]) -> dict[str, float]:
    """Value -> where it stands. Numbers keep their distances, or those of their logarithms where they span much."""
    ordered = _ordered(values)
    axes.set_xlabel(key)
    places = [float(value) for value in ordered] if _numeric(values) else []
    if places and min(places) > 0 and max(places) / min(places) >= 4:
        places = [math.log(place) for place in places]
    gaps = [high - low for low, high in pairwise(places)]
    if not gaps or min(gaps) < (places[-1] - places[0]) / 16:  # their names would stand on each other
        places = [float(number) for number in range(len(ordered))]
        axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_xticks(places, ordered)
    return dict(zip(ordered, places, strict=True))


def _bars(axes: Any, points: Sequence[Point]) -> None:
    ordered = sorted(points, key=lambda point: -point.loss)
    names = [" ".join(f"{key}={value}" for key, value in point.settings.items()) or "the job" for point in ordered]
    losses = [point.loss if math.isfinite(point.loss) else 0.0 for point in ordered]
    axes.barh(
        range(len(ordered)), losses, color=[ACCENT if n == len(ordered) - 1 else SOFT for n in range(len(ordered))]
    )
    axes.set_yticks(range(len(ordered)), names, fontsize=9)
    for y, point in enumerate(ordered):
        said = f" {point.loss:.4f}" if math.isfinite(point.loss) else " failed" if point.failed else " not scored"
        axes.text(losses[y], y, said, va="center", fontsize=9, color=FAILED if point.failed else INK)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.margins(x=0.15)


def _ordered(values: list[str]) -> list[str]:
    return sorted(values, key=float) if _numeric(values) else values


def _numeric(values: list[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in values)
    except ValueError:
        return False
