"""The report's two plots as inline SVG whose colours follow the page's light or dark style."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from finetune.curves import draw_loss

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and takes the page's font
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "finetune",  # the same figures give the same page
}
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--line)", "#030303": "var(--accent)", "#040404": "var(--soft)"}
"""Stand-ins that matplotlib draws with -> the page's colours."""
INK, LINE, ACCENT, SOFT = COLOURS


def intervals(rows: Sequence[tuple[str, float, float, float]], confidence: float) -> str:
    """SVG of one dot with its interval per (name, share, low, high), as fractions of 1."""
    figure, axes = _figure(1.0 + 0.42 * len(rows))
    for y, (name, share, low, high) in enumerate(reversed(rows)):
        colour = ACCENT if name == "tuned" else SOFT
        axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot([100 * share], [y], marker="o", color=colour, markersize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"right answers, % (line: {100 * confidence:g} % interval)")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    return _svg(figure, axes, "Right answers of base, tuned and the most frequent answer, with intervals")


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """SVG of the training loss at every logged update, with a running mean where there are enough of them."""
    figure, axes = _figure(2.6)
    window = draw_loss(axes, steps, losses, accent=ACCENT, soft=SOFT)
    axes.set_xlabel("update" if window == 1 else f"update (bold: mean of the last {window})")
    axes.set_ylabel("loss, nats per token")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return _svg(figure, axes, "Training loss by update")


def _figure(height: float) -> tuple[Any, Any]:
    """A figure and its axes, outside pyplot, which would keep them."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        FigureCanvasSVG(figure)
        return figure, figure.subplots()


def _svg(figure: Any, axes: Any, title: str) -> str:
    import matplotlib

    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(colors=INK, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    axes.set_axisbelow(True)
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Names such as axes_1 would stand on the page twice. The hashed ones are referred to.
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
