"""A plan as a page on the terminal: `show_plan(figures)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.compare import Row
from finetune.figure import Figure
from finetune.plan import Plan
from finetune.views import number

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
    for name, group in figures.groups().items():
        if group:
            console.print(figure_table(name, group))
    console.print(Text(figures.verdict, style="bold green" if figures.fits else "bold yellow"))
    seen = any(figure.basis == "measured" for group in figures.groups().values() for figure in group)
    console.print(
        "Given figures are the recipe's and its model card's. "
        + ("What is measured says where. " if seen else "Nothing here is measured. ")
        + "Not legal advice.",
        style="dim",
    )


def show_comparison(rows: Sequence[Row], console: Console) -> None:
    """Prints what was planned beside what was measured, with the error; nothing where there is no row."""
    from rich.table import Table

    if not rows:
        return
    title = "planned and measured here"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, justify in (("", "left"), ("planned", "right"), ("measured", "right"), ("", "left"), ("error", "right")):
        table.add_column(name, justify=justify, no_wrap=name != "")  # type: ignore[arg-type]
    table.add_column("", style="dim")
    for row in rows:
        error = f"{row.error:+.1%}"
        table.add_row(row.name, f"{row.planned:,.4g}", f"{row.measured:,.4g}", row.unit, error, row.how)
    console.print(table)


def figure_table(title: str, figures: Sequence[Figure]) -> object:
    """Figures as a table: name, number, unit, kind and source."""
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
