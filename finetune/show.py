"""A plan as a page on the terminal: `show_plan(figures)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.figure import Figure
from finetune.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console


def show_plan(figures: Plan, console: Console) -> None:
    """Prints the plan: the base and its duties, tables of figures each with where it comes from, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_column(style="bold")
    head.add_column()
    head.add_row("recipe", Text(f"{figures.recipe} ({figures.scale})"))
    head.add_row("base", Text(figures.model))
    if figures.note:
        head.add_row("note", Text(figures.note))
    head.add_row("licence", Text(figures.licence))
    for duty in figures.duties:
        head.add_row("", Text(f"- {duty}"))
    head.add_row("facts", Text(figures.facts))
    console.print(head)
    names = ("parameters", "memory of one device while training", "disk", "work", "time and money")
    groups = (figures.parameters, figures.memory, figures.disk, figures.work, figures.cost)
    for name, group in zip(names, groups, strict=True):
        console.print(_table(name, group))
    console.print(Text(figures.verdict, style="bold green" if figures.fits else "bold yellow"))
    console.print(
        "Given figures are the recipe's and its model card's. Nothing here is measured. Not legal advice.", style="dim"
    )


def number(value: float) -> str:
    """A number as a person reads it: thousands apart, three digits of a fraction, powers of ten when huge."""
    if value >= 1e13 or 0 < value < 1e-3:
        return f"{value:.3g}"
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(title: str, figures: Sequence[Figure]) -> object:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("", style="dim")
    for figure in figures:
        table.add_row(figure.name, number(figure.value), figure.unit, figure.basis, figure.how)
    return table
