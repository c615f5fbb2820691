"""Tables and pictures that a notebook shows and a terminal prints: `Table`, `Panel`, `Scores`, `Losses`.

HTML is escaped, styled in place (notebooks take `<style>` out of pages they do not trust), has no background of its own
and takes the colour of the text around it, so that it can be read on light and dark pages.
"""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

Cell = str | int | float | bool | None
"""What stands in a table. None means that there is no such value."""

LINE = "1px solid rgba(128,128,128,.45)"
ABSENT = "-"


def number(value: float) -> str:
    """A number as a person reads it: thousands apart, three digits of a fraction, powers of ten when huge."""
    if value >= 1e13 or 0 < value < 1e-3:
        return f"{value:.3g}"
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """Rows under named columns."""

    title: str
    """What it shows; may be empty."""
    columns: tuple[str, ...]
    """Names of the columns, each once."""
    rows: tuple[tuple[Cell, ...], ...]
    """Values, as they were measured: nothing is rounded."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Column -> how its numbers are written, e.g. `.1%`; `number` where there is none."""
    note: str = ""
    """A sentence below it."""

    def as_rows(self) -> list[dict[str, Cell]]:
        """A dict per row, column -> value, as pandas.DataFrame takes it."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def __repr__(self) -> str:
        cells = [[[name] for name in self.columns]]
        cells += [[folded(self._text(i, cell)) for i, cell in enumerate(row)] for row in self.rows]
        widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for row in cells:
            for parts in zip_longest(*row, fillvalue=""):
                padded = (
                    f"{text:>{width}}" if self._numeric(i) else f"{text:{width}}"
                    for i, (text, width) in enumerate(zip(parts, widths, strict=True))
                )
                lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        from markupsafe import Markup, escape

        def row(tag: str, texts: list[str], last: bool) -> Markup:
            cells = Markup("").join(
                Markup('<{} style="text-align:{};padding:.15em 1.2em .15em 0;vertical-align:top;{}">{}</{}>').format(
                    Markup(tag),
                    "right" if self._numeric(i) else "left",
                    Markup("") if last else Markup(f"border-bottom:{LINE};"),
                    Markup("<br>").join(escape(line) for line in text.split("\n")),
                    Markup(tag),
                )
                for i, text in enumerate(texts)
            )
            return Markup('<tr style="background:transparent">{}</tr>').format(cells)

        body = [[self._text(i, cell) for i, cell in enumerate(r)] for r in self.rows]
        caption = Markup('<caption style="text-align:left;font-weight:bold;color:inherit">{}</caption>')
        return str(
            Markup(
                '<table style="border-collapse:collapse;border:none;margin:.5em 0;color:inherit;'
                'background:transparent">{}<thead>{}</thead><tbody>{}</tbody></table>{}'
            ).format(
                caption.format(self.title) if self.title else "",
                row("th", list(self.columns), last=False),
                Markup("").join(row("td", texts, n == len(body)) for n, texts in enumerate(body, 1)),
                paragraph(self.note),
            )
        )

    def _text(self, column: int, cell: Cell) -> str:
        name = self.columns[column]
        if cell is None:
            return ABSENT
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if isinstance(cell, str):
            return cell
        return format(cell, self.forms[name]) if name in self.forms else number(cell)

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(c, int | float) and not isinstance(c, bool) for c in cells)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Panel:
    """Tables under one another, with a sentence before and a picture behind them."""

    sentence: str = ""
    """What they say together."""
    tables: tuple[Table, ...] = ()
    """The tables, from top to bottom."""
    picture: Path | None = None
    """A PNG file; only notebooks show it."""

    def __repr__(self) -> str:
        return "\n\n".join([*([self.sentence] if self.sentence else []), *map(repr, self.tables)])

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self.tables)
        return f'<div style="color:inherit">{paragraph(self.sentence, bold=True)}{tables}{picture(self.picture)}</div>'


@dataclass(frozen=True, slots=True, repr=False)
class Scores:
    """Base against tuned, as scores.json has it."""

    values: dict[str, Any]
    """All of scores.json."""

    @property
    def base(self) -> dict[str, Any]:
        """Loss in nats per answer token, share of right answers and its interval, of the base."""
        return dict(self.values["base"])

    @property
    def tuned(self) -> dict[str, Any]:
        """The same of the tuned model."""
        return dict(self.values["tuned"])

    @property
    def verdict(self) -> str:
        """Whether it got better, in a paragraph that claims no more than the tests show."""
        return str(self.values["verdict"])

    @property
    def tests(self) -> Table:
        """Paired tests of tuned against base."""
        found = [(name, test) for name, test in self.values["tests"].items() if test]
        rows = tuple(
            (name.replace("_", " "), test["test"], *(test[k] if k in test else None for k in ("wins", "losses", "p")))
            for name, test in found
        )
        return Table("paired tests", ("", "test", "better", "worse", "p"), rows, {"p": ".2g"})

    @property
    def gates(self) -> Table:
        """What the recipe demands, and whether it is met."""
        rows = tuple((g["gate"], g["limit"], g["value"], g["passed"]) for g in self.values["gates"])
        return Table("gates", ("gate", "demanded", "is", "met"), rows)

    @property
    def table(self) -> Table:
        """Loss and right answers, side by side."""
        rows: list[tuple[Cell, ...]] = []
        for name in ("base", "tuned", "majority"):
            side = self.values[name]
            if side is not None:
                said = f"always {side['answer']}" if name == "majority" else name
                loss = side["loss"] if "loss" in side else None
                rows.append((said, loss, side["accuracy"], side["low"], side["high"]))
        forms = {"loss": ".3f", "right": ".1%", "from": ".1%", "to": ".1%"}
        level = f"{100 * self.values['confidence']:g} % intervals"
        title = f"{self.values['rows']} held-out rows; loss in nats per token, right answers with {level}"
        return Table(title, ("", "loss", "right", "from", "to"), tuple(rows), forms)

    def as_rows(self) -> list[dict[str, Cell]]:
        """A dict per side: name, loss, share of right answers and its interval."""
        return self.table.as_rows()

    def __repr__(self) -> str:
        return repr(self._panel())

    def _repr_html_(self) -> str:
        return self._panel()._repr_html_()

    def _panel(self) -> Panel:
        gates = (self.gates,) if self.values["gates"] else ()
        return Panel(sentence=self.verdict, tables=(self.table, self.tests, *gates))


@dataclass(frozen=True, slots=True, repr=False)
class Losses:
    """The losses of a training, update by update."""

    steps: tuple[dict[str, Any], ...]
    """An entry per update, as train.json has it: step, loss, lr, grad_norm, seconds, tokens."""
    picture: Path | None
    """Their plot, a PNG file, where there is one."""

    @property
    def values(self) -> list[float]:
        """The training loss of each update, in nats per token."""
        return [step["loss"] for step in self.steps]

    def as_rows(self) -> list[dict[str, Cell]]:
        """A dict per update."""
        return [dict(step) for step in self.steps]

    def __repr__(self) -> str:
        if not self.steps:
            return "no updates"
        first, last = self.values[0], self.values[-1]
        return f"training loss {first:.3f} at the first update, {last:.3f} at the last of {len(self.steps)}"

    def _repr_html_(self) -> str:
        return f'<div style="color:inherit">{paragraph(repr(self))}{picture(self.picture)}</div>'


def folded(text: str) -> list[str]:
    """The text in lines of at most 60 characters, longer words left whole."""
    whole = (textwrap.wrap(line, 60, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return [line for lines in whole for line in lines] or [""]


def paragraph(text: str, bold: bool = False) -> str:
    """The text as an HTML paragraph; empty for an empty text."""
    from markupsafe import Markup

    weight = Markup("font-weight:bold;") if bold else ""
    return str(Markup('<p style="max-width:60em;{}">{}</p>').format(weight, text)) if text else ""


def picture(path: Path | None) -> str:
    """A PNG file inside the page; empty where there is none."""
    if path is None or not path.is_file():
        return ""
    from markupsafe import Markup

    data = base64.b64encode(path.read_bytes()).decode("ascii")
    style = "max-width:100%;background:white"
    return str(Markup('<img alt="{}" style="{}" src="data:image/png;base64,{}">').format(path.stem, style, data))
