"""Total cost of ownership as a page on the terminal: `tell(reckoned)`."""

from __future__ import annotations

from typing import Any

from finetune.show import figure_table
from finetune.tco import Reckoning


def tell(reckoned: Reckoning, plot: str = "", console: Any = None) -> None:
    """Prints what went in, the node, the tokens, the API, where both are even, the sensitivity, and the verdict."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    groups = {
        "what goes in": reckoned.inputs,
        "a node of your own": reckoned.node,
        "a million tokens of your own": reckoned.tokens,
        "the same from an API": reckoned.api,
        "from when on it pays": reckoned.even,
    }
    for title, figures in groups.items():
        console.print(figure_table(title, figures))
    console.print(_sensitivity(reckoned))
    for claim, holds in reckoned.golden:
        console.print(Text(f"“{claim}”: {holds}."))
    console.print(Text(reckoned.verdict, style="bold"))
    if plot:
        console.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)


def _sensitivity(reckoned: Reckoning) -> Any:
    """Rows: latency and utilisation; columns: price of the node; cells: price per million, and times cheaper."""
    from rich.table import Table

    money, cells = reckoned.currency, reckoned.sensitivity
    title = f"{money} per million tokens, serving alone (x: the API's price over it)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("full load", justify="right")
    prices = list(dict.fromkeys(cell.node_per_hour for cell in cells))
    for price in prices:
        table.add_column(f"{price:,.2f} {money}/h", justify="right", no_wrap=True)
    rows: dict[tuple[str, float], list[str]] = {}
    for cell in cells:
        said = f"{cell.per_million:,.2f} ({cell.cheaper:.1f}x)"
        rows.setdefault((cell.latency, cell.utilisation), []).append(said)
    before = ""
    for (latency, share), prices_of_row in rows.items():
        table.add_row("" if latency == before else latency, f"{share:.0%}", *prices_of_row)
        before = latency
    return table
