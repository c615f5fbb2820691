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
    def forgetting(self) -> Table | None:
        """General questions, by card: right answers of base and tuned, and the change; None where none were asked."""
        told = self._part("forgetting")
        if told is None:
            return None
        rows: list[tuple[Cell, ...]] = [
            (each["name"], each["rows"], each["base"]["accuracy"], each["tuned"]["accuracy"], *_change(each))
            for each in told["sets"]
        ]
        if len(rows) > 1:
            rows.append(("all", sum(each["rows"] for each in told["sets"]), None, None, *_change(told)))
        forms = {"base": ".1%", "tuned": ".1%", **CHANGES}
        columns = ("", "rows", "base", "tuned", *CHANGES)
        return Table("forgetting: general questions, changes in points", columns, tuple(rows), forms, told["verdict"])

    @property
    def drift(self) -> Table | None:
        """What becomes of harmful and harmless prompts, as shares of them; None where nothing was asked."""
        told = self._part("safety")
        if told is None:
            return None
        kinds = (("harmful", "harmful"), ("benign", "harmless"))
        sides = {f"{words}, {name}": told[name][kind] for kind, words in kinds for name in ("base", "tuned")}
        classes = tuple(next(iter(sides.values())))
        rows = tuple((title, *(shares[each]["value"] for each in classes)) for title, shares in sides.items())
        draws = 1 + len(told["seeds"])
        title = f"drift against base: {told['prompts']} harmful and {told['benign']} harmless prompts"
        title += f", {draws} answers each"
        return Table(title, ("", *classes), rows, dict.fromkeys(classes, ".0%"), told["verdict"])

    @property
    def tasks(self) -> Table | None:
        """Benchmarks that base and tuned took, their parts and their rows seen in training; None where none."""
        told = self._part("tasks")
        if told is None:
            return None
        rows: list[tuple[Cell, ...]] = []
        for one in told["sets"]:
            p = one["test"]["p"] if one["test"] else None
            rows.append((one["task"], one["metric"], one["rows"], *_sides(one), *_change(one["difference"]), p))
            for part in one["slices"]:
                name = f"  {part['name']}"
                rows.append((name, "", part["rows"], *_sides(part), *_change(part["difference"]), None))
            if hit := one["contaminated"]:
                for words, part, count in (
                    ("without", hit["clean"], one["rows"] - hit["rows"]),
                    ("alone", hit["hit"], hit["rows"]),
                ):
                    name = f"  rows seen in training, {words}"
                    rows.append((name, "", count, *_sides(part), None, None, None, None))
        forms = {"base": ".3f", "tuned": ".3f", "change": "+.3f", "from": "+.3f", "to": "+.3f", "p": ".2g"}
        return Table("benchmarks", ("task", "metric", "rows", "base", "tuned", *CHANGES, "p"), tuple(rows), forms)

    def _part(self, name: str) -> Any:
        """A part of scores.json; None where it was not asked for, or the file is older than it."""
        return self.values[name] if name in self.values else None

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
        asked = tuple(table for table in (self.forgetting, self.drift, self.tasks) if table is not None)
        gates = (self.gates,) if self.values["gates"] else ()
        return Panel(sentence=self.verdict, tables=(self.table, self.tests, *asked, *gates))


CHANGES = {"change": "+.1%", "from": "+.1%", "to": "+.1%"}
"""Columns of a change of a share and its interval, and how they are written."""


def _change(told: dict[str, Any]) -> tuple[Cell, Cell, Cell]:
    """A change and the ends of its interval; tasks call it `mean`."""
    return told["mean" if "mean" in told else "change"], told["low"], told["high"]


def _sides(told: dict[str, Any]) -> tuple[Cell, Cell]:
    """What base and tuned have of a task or a part of it; None where there is nothing."""
    base, tuned = told["base"], told["tuned"]
    return base["value"] if base else None, tuned["value"] if tuned else None


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
