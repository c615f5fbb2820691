"""Plots of the report as inline SVG: drawn by matplotlib, in colours that follow the page's light or dark style."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from finetune.curves import draw_loss

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and takes the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names of tasks may hold a dollar sign
}
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--accent)",
    "#040404": "var(--soft)",
    "#050505": "var(--card)",
    **{f"#0{n}0{n}0{n}": f"var(--run-{n - 5})" for n in range(6, 10)},
    "#0a0a0a": "var(--run-5)",
    "#0b0b0b": "var(--run-6)",
}
"""Stand-ins that matplotlib draws with -> the page's colours."""
INK, LINE, ACCENT, SOFT, CARD, *RUNS = COLOURS
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
"""Line styles of several runs: colour is never the only sign."""
HEAT = (0x2F / 255, 0x86 / 255, 0xE0 / 255)
"""One blue that shows on white and on black; how much of it is the cell's opacity."""
WIDTH = 4.2
"""Inches: text of 10 points is then 10 pixels on a phone and 15 on a wide screen."""
MOST_POINTS = 400
"""A longer curve is drawn as means of neighbouring updates: a screen shows no more, and the page stays small."""
MOST_MARKS = 300
"""More experts without a token than this are only counted in the table."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure of base and tuned, as fractions of 1."""

    name: str
    """What it is a figure of."""
    base: tuple[float, float, float]
    """Base: value, low, high."""
    tuned: tuple[float, float, float]
    """Tuned: value, low, high."""


def intervals(rows: Sequence[tuple[str, float, float, float]], confidence: float) -> str:
    """SVG of one dot with its interval per (name, share, low, high), as fractions of 1."""
    title = "Right answers of base, tuned and the most frequent answer, with intervals"
    with _drawing("intervals", 0.75 + 0.3 * len(rows)) as (axes, svg):
        for y, (name, share, low, high) in enumerate(reversed(rows)):
            _interval(axes, y, (share, low, high), tuned=name == "tuned")
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"right answers, % (line: {100 * confidence:g} % interval)")
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        return svg(title)


def pairs(name: str, rows: Sequence[Pair], title: str, label: str) -> str:
    """SVG of base (hollow square) and tuned (dot) per row, with intervals. `name` is the plot's own on its page."""
    with _drawing(name, 0.9 + 0.42 * len(rows)) as (axes, svg):
        for y, row in enumerate(reversed(rows)):
            _interval(axes, y - 0.14, row.base, tuned=False)
            _interval(axes, y + 0.14, row.tuned, tuned=True)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel(label)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        return svg(title)


def loss_curve(steps: Sequence[int], losses: Sequence[float], heldout: Sequence[tuple[int, float]] = ()) -> str:
    """SVG of the training loss by update, with a running mean where there are enough, and held-out losses."""
    with _drawing("loss", 2.2) as (axes, svg):
        window = draw_loss(axes, *thinned(steps, losses), accent=ACCENT, soft=SOFT)
        if heldout:
            places, values = zip(*heldout, strict=True)
            axes.plot(places, values, color=INK, marker="D", markersize=5, markerfacecolor=CARD, linewidth=1)
            axes.set_ylim(0, 1.05 * max(*losses, *values))
        axes.set_xlabel("update" if window == 1 else "update (bold: running mean)")
        axes.set_ylabel("loss, nats per token")
        _over_updates(axes)
        return svg("Training loss by update")


def curve(name: str, steps: Sequence[int], values: Sequence[float], title: str, label: str) -> str:
    """SVG of one figure by update, from zero. `name` is the plot's own on its page."""
    with _drawing(name, 2.2) as (axes, svg):
        places, drawn = thinned(steps, values)
        few = len(places) < 12
        axes.plot(places, drawn, color=ACCENT, linewidth=1.5, marker="o" if few else "", markersize=3.5)
        axes.set_ylim(0, 1.05 * max(drawn) or 1)
        axes.set_xlabel("update")
        axes.set_ylabel(label)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
        _over_updates(axes)
        return svg(title)


def losses_of_runs(runs: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> str:
    """SVG of the running mean of the training loss of several (name, steps, losses), one dash and colour each."""
    from finetune.curves import running_mean

    with _drawing("losses", 3.1) as (axes, svg):
        for i, (name, steps, losses) in enumerate(runs):
            smooth = running_mean(losses, max(1, len(losses) // 12))
            axes.plot(
                *thinned(steps, smooth),
                color=RUNS[i % len(RUNS)],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.8,
                label=f"run {name}",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("update (running mean)")
        axes.set_ylabel("loss, nats per token")
        _over_updates(axes)
        axes.legend(frameon=False, ncols=min(3, len(runs)), loc="lower left", bbox_to_anchor=(-0.02, 1), labelcolor=INK)
        return svg("Training loss of every run by update")


def gains_of_runs(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """SVG of one dot with its interval per run: (name, share, low, high), as fractions of 1."""
    with _drawing("gains", 0.75 + 0.32 * len(rows)) as (axes, svg):
        for y, (_, *values) in enumerate(reversed(rows)):
            _interval(axes, y, (values[0], values[1], values[2]), tuned=True)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel(label)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        return svg("Right answers of the tuned model of every run, with intervals")


def bars(name: str, rows: Sequence[tuple[str, float, float | None]], title: str, label: str) -> str:
    """SVG of horizontal bars: (name, measured, planned or None); what was planned is an outline behind."""
    with _drawing(name, 0.8 + 0.34 * len(rows)) as (axes, svg):
        for y, (_, measured, planned) in enumerate(reversed(rows)):
            if planned is not None:
                axes.barh(y, planned, height=0.66, facecolor="none", edgecolor=SOFT, linewidth=1.2, linestyle="--")
            axes.barh(y, measured, height=0.36, color=ACCENT)
        axes.set_yticks(range(len(rows)), [_short(row[0]) for row in reversed(rows)])
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        return svg(title)


def router_heat(loads: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """SVG of a heat map: a row per layer, a column per expert, as multiples of an even share; crosses got nothing."""
    import numpy as np

    width = max(map(len, loads))
    shares = np.full((len(loads), width), np.nan)
    for row, tokens in enumerate(loads):
        shares[row, : len(tokens)] = np.asarray(tokens) * len(tokens) / max(1, sum(tokens))
    top = float(min(max(2.0, np.nanquantile(shares, 0.995)), width))
    height = min(5.0, max(1.4, 0.9 + 0.08 * len(loads))) + 0.4
    with _drawing("router", height, 5.0 if width > 16 else WIDTH) as (axes, svg):
        axes.imshow(_blue(shares / top), aspect="auto", interpolation="none")
        idle = np.argwhere(shares == 0)
        if 0 < len(idle) <= MOST_MARKS:
            axes.plot(idle[:, 1], idle[:, 0], linestyle="none", marker="x", markersize=4, color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        places = sorted(set(np.linspace(0, len(loads) - 1, min(len(loads), 8)).round().astype(int).tolist()))
        axes.set_yticks(places, [names[place] for place in places])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        key = axes.inset_axes((0.0, 1 + 0.12 / height, 0.4, 0.14 / height))
        key.imshow(_blue(np.linspace(0, 1, 64)[None, :]), aspect="auto", extent=(0, top, 0, 1), interpolation="none")
        key.set_yticks([])
        key.xaxis.tick_top()
        key.set_xticks([0, 1, top], ["0", "1", f"{top:.2g}"])
        key.text(1.04, 0.5, "times an even share", transform=key.transAxes, va="center", color=INK)
        return svg("Tokens per expert and layer, as multiples of an even share")


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """A curve of at most MOST_POINTS points: the means of neighbours, at the last step of each."""
    each = -(-len(steps) // MOST_POINTS)
    if each <= 1:
        return steps, values
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    ends = [steps[min(i + each, len(steps)) - 1] for i in range(0, len(steps), each)]
    return ends, [sum(part) / len(part) for part in parts]


def _interval(axes: Any, y: float, values: tuple[float, float, float], *, tuned: bool) -> None:
    share, low, high = (100 * value for value in values)
    colour = ACCENT if tuned else SOFT
    axes.plot([low, high], [y, y], color=colour, linewidth=3, solid_capstyle="round", clip_on=False)
    face = {} if tuned else {"markerfacecolor": CARD, "markeredgewidth": 1.8}
    axes.plot(
        [share], [y], marker="o" if tuned else "s", color=colour, markersize=8 if tuned else 7, clip_on=False, **face
    )


def _blue(strength: Any) -> Any:
    """Opacities from 0 to 1 as pixels; where there is no expert nothing is drawn."""
    import numpy as np

    alpha = np.clip(np.nan_to_num(strength, nan=0.0), 0, 1)
    return np.dstack([np.full_like(alpha, part) for part in HEAT] + [alpha])


def _over_updates(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=LINE, linewidth=0.8)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "\u2026"


@contextmanager
def _drawing(name: str, height: float, width: float = WIDTH) -> Iterator[tuple[Any, Any]]:
    """The axes of a figure, outside pyplot, which would keep it; and what makes its SVG, given a title."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The same figures give the same page, and no two plots of a page the same ids.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"finetune {name}"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        yield axes, lambda title: _svg(figure, title)


def _svg(figure: Any, title: str) -> str:
    for axes in figure.findobj(lambda artist: hasattr(artist, "spines")):
        for spine in axes.spines.values():
            spine.set_color(LINE)
        axes.tick_params(colors=INK, length=0)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
            text.set_color(INK)
        axes.set_axisbelow(True)
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Names such as axes_1 would stand on the page twice. The hashed ones are referred to.
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    head, _, rest = text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1).partition(">")
    return f"{head}>\n <title>{escape(title)}</title>{rest}"
