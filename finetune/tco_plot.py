"""`plan tco plot=FILE`: what a million tokens cost by how busy the node is, against the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.curves import ACCENT, INK, new_figure, save_png, tidy
from finetune.errors import RecipeError
from finetune.rundir import atomic_file
from finetune.tco import Reckoning

COLOURS = (ACCENT, "#c4572b", "#3b8a5a", "#8a5aa8", "#a88a2d", "#5a6472")
SUFFIXES = (".png", ".svg")


def draw(target: Path, reckoned: Reckoning) -> None:
    """Draws the sensitivity table at the price of the node that is nearest to the stated one, as PNG or SVG.

    Raises RecipeError (TCO-006) for another kind of file.
    """
    if target.suffix not in SUFFIXES:
        raise RecipeError([f"TCO-006 plot={target} ends neither with .png nor with .svg. Type: plot=tco.png"])
    price = reckoned.figure("node per hour").value
    prices = {cell.node_per_hour for cell in reckoned.sensitivity}
    nearest = min(prices, key=lambda p: abs(p - price))
    figure, axes = new_figure(8.5, 5)
    for number, latency in enumerate(dict.fromkeys(cell.latency for cell in reckoned.sensitivity)):
        cells = [c for c in reckoned.sensitivity if c.latency == latency and c.node_per_hour == nearest]
        cells.sort(key=lambda cell: cell.utilisation)
        places, costs = [100 * cell.utilisation for cell in cells], [cell.per_million for cell in cells]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(places, costs, color=colour, linewidth=2, marker="o", markersize=5, label=latency)
    for name, style in (("API, output alone", ":"), ("API, blend", "--"), ("API, output with its input", "-.")):
        value = reckoned.figure(name).value
        axes.axhline(value, color=INK, linestyle=style, linewidth=1, label=f"{name}: {value:,.2f}")
    if all(cell.per_million > 0 for cell in reckoned.sensitivity):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.4g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("share of the time at full load, %")
    axes.set_ylabel(f"{reckoned.currency} per million tokens, serving alone")
    axes.set_title(f"{reckoned.recipe}: a node at {nearest:,.2f} {reckoned.currency} an hour", loc="left", fontsize=11)
    tidy(axes)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    if target.suffix == ".png":
        save_png(figure, target)
        return
    with atomic_file(target) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
