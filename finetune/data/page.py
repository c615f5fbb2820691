"""What a person sees of prepared rows: the report on the terminal, and rows with their trained tokens coloured."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from finetune.data.tokens import Tokens, pieces
from finetune.rundir import write_text

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 60rem }
body { color: #1b1b1b; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; border-radius: 4px; padding: 0.8rem }
mark { background: #bfe8c6; color: #12331a; border-radius: 2px }
i { font-style: normal; border-right: 1px solid #0002 }
h2 { font-size: 1rem; margin: 1.6rem 0 0.4rem }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #161616 } pre { border-color: #444 } mark { background: #1f5a2c; color: #e4ffe9 }
}
"""


def show_report(report: dict[str, Any], console: Any) -> None:
    """Prints what came in, what was kept, why the rest was not, and what was found."""
    from rich.table import Table

    further = f", {report['further_excerpts']:,} further excerpts of them" if report["further_excerpts"] else ""
    table = Table(title=f"{report['rows_read']:,} rows read{further}")
    for column in ("", "rows", "share"):
        table.add_column(column, justify="left" if not column else "right")
    whole = max(1, report["rows_read"] + report["further_excerpts"])
    for name, split in report["splits"].items():
        table.add_row(f"kept: {name}", f"{split['rows']:,}", f"{split['rows'] / whole:.1%}")
    for code, count in report["dropped"].items():
        table.add_row(f"dropped: {code}", f"{count:,}", f"{count / whole:.1%}")
    console.print(table)
    for name, split in report["splits"].items():
        say(
            console,
            f"{name}: {split['tokens']:,} tokens, {split['trainable_tokens']:,} of them trained; "
            f"median {split['median_length']:,}, longest {split['longest']:,} tokens",
        )
    if "packing" in report:
        packed = report["packing"]
        say(
            console,
            f"packed: {packed['rows']:,} rows in {packed['sequences']:,} sequences, {packed['filled']:.0%} full",
        )
    if report["truncated"]:
        say(console, f"cut: {report['truncated']:,} rows lost their end to data.max_length")
    if report["found"]:
        say(console, "found: " + ", ".join(f"{count:,} {what}" for what, count in report["found"].items()))
    for note in report["notes"]:
        say(console, note)
    for limit in report["not_detected"]:
        say(console, f"not detected: {limit}")


def say(console: Any, text: str) -> None:
    """A line of plain text."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_rows(rows: list[dict[str, Any]], tokenizer: Any, console: Any) -> None:
    """Prints rows with their trained tokens in green (between ⟦ and ⟧ where there are no colours)."""
    from rich.text import Text

    for row in rows:
        tokens = Tokens(input_ids=row["input_ids"], labels=row["labels"])
        say(console, f"\nrow {row['row']}: {len(tokens.input_ids)} tokens, {tokens.trainable} trained")
        text = Text()
        for piece, trained in pieces(tokenizer, tokens):
            plain = console.no_color or not console.is_terminal
            text.append(f"⟦{piece}⟧" if trained and plain else piece, style="bold green" if trained else "dim")
        console.print(text, soft_wrap=True)


def write_page(rows: list[dict[str, Any]], tokenizer: Any, title: str, target: Path) -> None:
    """Writes the same as one HTML file that needs nothing else; borders of tokens are thin lines."""
    parts = []
    for row in rows:
        tokens = Tokens(input_ids=row["input_ids"], labels=row["labels"])
        head = f"row {row['row']}: {len(tokens.input_ids)} tokens, {tokens.trainable} trained"
        parts.append(f"<h2>{html.escape(head)}</h2>\n<pre>{_coloured(tokens, tokenizer)}</pre>")
    body = "\n".join(parts)
    write_text(
        target,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        f"<h1>{html.escape(title)}</h1>\n<p><mark>Green</mark> tokens are trained; the others are only read.</p>\n"
        f"{body}\n</body></html>\n",
    )


def _coloured(tokens: Tokens, tokenizer: Any) -> str:
    """Tokens one by one. Bytes of a character that several tokens share are shown with the last of them."""
    out: list[str] = []
    waiting: list[int] = []
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        if "\ufffd" in text and len(waiting) < 8:
            continue
        waiting = []
        piece = f"<i>{html.escape(text)}</i>"
        out.append(f"<mark>{piece}</mark>" if label != -100 else piece)
    if waiting:
        out.append(html.escape(str(tokenizer.decode(waiting))))
    return "".join(out)
