"""Curves that several rooms draw on axes they are given: `draw_loss`, `running_mean`; and `save_png`, whole or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, LINE, ACCENT, SOFT = "#1f2430", "#d9dce3", "#2d5fa8", "#9db4d6"
"""Colours of our pictures: text, grid, what matters, what stands behind it."""
STYLE = {"font.family": "sans-serif", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw_loss(axes: Any, steps: Sequence[int], losses: Sequence[float], *, accent: str, soft: str) -> int:
    """Draws the loss of every step, with a running mean over it where there are enough; that mean's steps, or 1."""
    window = max(1, len(losses) // 12)
    alone = window == 1
    axes.plot(
        steps,
        losses,
        color=accent if alone else soft,
        linewidth=2 if alone else 1.1,
        marker="o",
        markersize=3.5 if alone else 0,
    )
    if not alone:
        axes.plot(steps, running_mean(losses, window), color=accent, linewidth=2.2)
    axes.set_ylim(0, 1.05 * max(losses) or 1)
    return window


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Any, Any]:
    """A figure for a PNG and its axes, in inches, outside pyplot, which would keep them; `subplots` as matplotlib's."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(**subplots)


def tidy(axes: Any) -> None:
    """A light grid of horizontal lines behind the curves, quiet spines."""
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(colors=INK, length=0)


def save_png(figure: Any, target: Path) -> None:
    """Writes the figure as a PNG, in one step."""
    from finetune.rundir import atomic_file

    with atomic_file(target) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})  # the same bytes for the same curve
