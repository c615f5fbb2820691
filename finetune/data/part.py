"""One block of records, made into one part of the prepared data: checked, cleaned and tokenised, in any process.

A part is a table with a line for every row that came in: its facts, from which all verdicts follow, and the rows of
tokens that became of it. Equal bytes in give equal bytes out, so a part that exists need not be made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from unicodedata import normalize

from finetune.data.cleaner import Cleaner, texts
from finetune.data.encoder import Encoder
from finetune.data.files import Block
from finetune.data.records import records
from finetune.data.rows import Row, plain, prompt_key, prompt_keys
from finetune.data.shape import conversation, grouped, renamed
from finetune.data.tokens import Tokens, cut, load_tokenizer, stop_tokens, vocabulary_rows, windows
from finetune.errors import DataError
from finetune.recipe import Data

FACTS: dict[str, str] = {
    "file": "string",
    "line": "int64",
    "nth": "int32",
    "id": "string",
    "sha256": "string",
    "code": "string",
    "why": "string",
    "split": "string",
    "label": "string",
    "time": "string",
    "further": "bool",
    "goes_on": "bool",
    "place": "int64",
    "tokens": "int32",
    "trainable": "int32",
    "truncated": "bool",
    "need": "int32",
    "text_key": "uint64",
    "prompt_key": "uint64",
    "system_key": "uint64",
    "group_key": "uint64",
    "order_key": "uint64",
    "privacy": "string",
    "flags": "string",
    "language": "string",
    "benchmarks": "string",
}
"""Column -> type. `need` is the length that keeps the row's answer; `place` the order that a card has given it;
`system_key` 0 where there is no system message; `nth` and `goes_on` as in `Row`."""


_ORDINARY = (
    r""".,;:!?'"()\[\]{}\-"""
    r"\u2010-\u2015\u2018-\u201f\u2022\u2026\u2039\u203a\u00a1\u00ab\u00bb\u00bf"  # dashes, quotation marks, dots
    r"\u3001\u3002\u3008-\u3011\uff01\uff08\uff09\uff0c\uff0e\uff1a\uff1b\uff1f"  # Chinese and Japanese
    r"\u060c\u061b\u061f\u06d4\u0964\u0965"  # Arabic, Hindi
    r"\u00ad\u200b\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"  # what nobody sees
)
_SIGNS = re.compile(rf"\w+|-(?=\d)|!(?==)|[^\w\s{_ORDINARY}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every process that makes parts must know."""

    data: Data
    """The settings."""
    base: Path
    """The folder whose tokenizer is used."""
    cut: str
    """`error`, `drop` or `cut`: what a row longer than `max_length` means."""
    near: bool
    """Whether signatures for near duplicates are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One block, and how its records become rows."""

    block: Block
    """Raw records of a file, or rows that a card has worded and split already."""
    format: str
    """Format of the block's rows, one of `shape.FORMATS`; empty for those of a card."""
    side: str
    """`train` or `heldout` where the file decides it, else empty."""
    prefix: str
    """What stands before ids, so that those of several files differ."""
    usual: list[str] = field(default_factory=list)
    """Columns that most rows at the beginning of the file have."""


def of_card(rows: list[Row]) -> Block:
    """Rows of one file of a card as a block."""
    records = [json.dumps(asdict(row)).encode() for row in rows]
    return Block(file=rows[0].file, kind="rows", lines=[row.line for row in rows], records=records)


class Maker:
    """Makes parts, one after the other, with one tokenizer."""

    def __init__(self, work: Work) -> None:
        self.work = work
        tokenizer = load_tokenizer(work.base)
        self.encoder = Encoder(
            tokenizer,
            stop_tokens(tokenizer, work.base),
            vocabulary=vocabulary_rows(work.base),
            turns=work.data.turns,
            reasoning=work.data.reasoning,
            end_of_turn=work.data.end_of_turn,
        )
        self.cleaner = Cleaner(work.data)

    def load(self) -> None:
        """Loads what the first row that needs it would load, so that processes that are forked have it."""
        self.cleaner.load()
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.encoder.encode([Row(file="", line=0, id="", sha256="", messages=said)])
        if self.work.near:
            from finetune.data.near import signature

            signature("a")

    def make(self, job: Job) -> Any:
        """The part of a block, a table with the columns of `part_schema`."""
        rows = list(self._rows(job))
        facts = [_fact(row, self.work.data.turns) for row in rows]
        for row, fact in zip(rows, facts, strict=True):
            if not row.code:
                row.decoded = self.encoder.decoded(row) if row.input_ids else []
                self.cleaner.clean(row, fact)
        good = [i for i, row in enumerate(rows) if not row.code]
        out: list[list[dict[str, Any]]] = [[] for _ in rows]
        for i, made in zip(good, self.encoder.encode([rows[i] for i in good]), strict=True):
            if isinstance(made, DataError):
                what = made.what.removeprefix(rows[i].where).strip(": ")
                rows[i].code, rows[i].why = made.code, f"{what}: {made.why}" if made.why else what
            else:
                out[i] = self._tokens(rows[i], facts[i], made)
        for row, fact in zip(rows, facts, strict=True):
            fact |= {"file": job.block.file, "code": row.code, "why": row.why, "split": row.split}
            if row.code:
                fact["truncated"] = False
        return self._table(rows, facts, out)

    def _table(self, rows: list[Row], facts: list[dict[str, Any]], made: list[list[dict[str, Any]]]) -> Any:
        import pyarrow as pa

        schema = part_schema(near=self.work.near)
        columns = [pa.array([fact[name] for fact in facts], schema.field(name).type) for name in FACTS]
        columns.append(pa.array([row.ignored for row in rows], schema.field("ignored").type))
        columns.append(pa.array([fact["asks"] for fact in facts], schema.field("asks").type))
        flat = pa.RecordBatch.from_pylist([row for each in made for row in each], schema=rows_schema())
        ends = pa.array([0, *accumulate(map(len, made))], pa.int32())
        columns.append(pa.ListArray.from_arrays(ends, flat.to_struct_array(), type=schema.field("made").type))
        if self.work.near:
            columns.append(self._signatures(rows))
        return pa.Table.from_arrays(columns, schema=schema)

    def _rows(self, job: Job) -> Iterable[Row]:
        if job.block.kind == "rows":
            yield from (Row(**json.loads(record)) for record in job.block.records)
            return
        data, name = self.work.data, Path(job.block.file).name
        extra = tuple(key for key in (data.group_by, data.time_by) if key)
        for record in records(job.block):
            row = Row(file=job.block.file, line=record.line, id=f"{name}:{record.place}", sha256=record.sha256)
            row.nth, row.goes_on, row.split = record.nth, record.goes_on, job.side
            value = renamed(record.value, data.columns) if isinstance(record.value, dict) else record.value
            faults = list(record.faults) or conversation(row, value, job.format, extra, job.usual)
            faults = faults or grouped(row, value, data.group_by, data.time_by)
            row.id = job.prefix + row.id
            if job.block.kind == "passages":
                row.group = job.block.file
            if faults:
                row.code, _, why = faults[0].partition(" @ ")
                row.why = "; ".join([why, *(fault.partition(" @ ")[2] for fault in faults[1:])])
            yield row

    def _tokens(self, row: Row, fact: dict[str, Any], tokens: Tokens) -> list[dict[str, Any]]:
        """The output rows of one row, and its facts about length."""
        data, length = self.work.data, len(tokens.input_ids)
        fact |= {"tokens": length, "trainable": tokens.trainable, "need": length}
        kept = [tokens]
        if row.text:
            kept = windows(tokens, data.max_length)
        elif length > data.max_length and self.work.cut == "cut":
            kept = [cut(tokens, data.max_length)]
            fact |= {"truncated": True, "trainable": kept[0].trainable, "need": tokens.prompt_length + 1}
            if kept[0].trainable:
                fact |= {"need": data.max_length, "tokens": data.max_length}
        if not row.text and fact["need"] > data.max_length:
            if self.work.cut == "drop":
                row.code, row.why = "long", f"{length} tokens, data.max_length={data.max_length}"
            else:
                row.code = "MASK-001"
                row.why = f"loses its answer to data.max_length={data.max_length}; {fact['need']} tokens keep it"
            return []
        return [
            {
                "row": row.id if len(kept) == 1 else f"{row.id}#{k}",
                "group": row.group,
                "input_ids": part.input_ids,
                "labels": part.labels,
                "prompt_length": part.prompt_length,
                "messages": [{"role": m["role"], "content": m["content"]} for m in row.messages],
                "answer": row.messages[-1]["content"] if row.messages else "",
                "choices": row.choices,
            }
            for k, part in enumerate(kept, 1)
        ]

    def _signatures(self, rows: list[Row]) -> Any:
        import numpy
        import pyarrow as pa

        from finetune.data.near import PERMUTATIONS, signature

        made = numpy.concatenate([signature("\n".join(_own_texts(row)) if not row.code else "") for row in rows])
        return pa.FixedSizeListArray.from_arrays(pa.array(made, pa.uint32()), PERMUTATIONS)


def rows_schema() -> Any:
    """Columns of the prepared rows."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("row", pa.string()),
            ("group", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("prompt_length", pa.int32()),
            ("messages", pa.list_(message)),
            ("answer", pa.string()),
            ("choices", pa.list_(pa.string())),
        ]
    )


def part_schema(*, near: bool) -> Any:
    """Columns of a part, which are FACTS and some more.

    `ignored`: columns of the file without a meaning here. `asks`: the `prompt_key` of every answer that is trained.
    `made`: the prepared rows that became of the row, each a struct of `rows_schema`. With `near`, `signature`:
    PERMUTATIONS values of uint32.
    """
    import pyarrow as pa

    columns = [(name, getattr(pa, kind if kind != "bool" else "bool_")()) for name, kind in FACTS.items()]
    columns += [("ignored", pa.list_(pa.string())), ("asks", pa.list_(pa.uint64()))]
    columns += [("made", pa.list_(pa.struct(list(rows_schema()))))]
    if near:
        from finetune.data.near import PERMUTATIONS

        columns.append(("signature", pa.list_(pa.uint32(), PERMUTATIONS)))
    return pa.schema(columns)


def key(text: str) -> int:
    """The first 64 bits of a text's sha256: rows, groups and questions are compared and ordered by it."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def said(text: str) -> str:
    """What two texts have in common that count as copies: no case, spacing and ordinary punctuation.

    Signs stay, as do the vowels of scripts that write them as marks: 4*1 is not 4/1, a smile no frown, and -5 not 5.
    """
    text = text.lower()
    return " ".join(_SIGNS.findall(text if text.isascii() else normalize("NFC", text)))


def _own_texts(row: Row) -> list[str]:
    """The words of a row without the system message, which all rows of an assistant have."""
    return texts(replace(row, messages=[m for m in row.messages if m["role"] != "system"]))


def _fact(row: Row, turns: str) -> dict[str, Any]:
    fact: dict[str, Any] = dict.fromkeys(FACTS, "") | {"asks": []}
    fact |= {"line": row.line, "id": row.id, "sha256": row.sha256, "label": row.label, "time": row.time}
    fact |= dict.fromkeys(("tokens", "trainable", "need", "text_key", "prompt_key", "system_key", "group_key"), 0)
    fact |= {"further": row.part > 1, "place": row.place, "truncated": False, "order_key": key(row.id)}
    fact |= {"nth": row.nth, "goes_on": row.goes_on}
    if not row.code:
        text = row.fields["text"] if "text" in row.fields else "\n".join(texts(row))
        tools = json.dumps(row.tools, sort_keys=True) if row.tools else ""
        fact["text_key"] = key(said(text) + tools or text or repr(row.input_ids))
        told = prompt_keys(row) or {-1: prompt_key(row)}
        row.group = row.group or list(told.values())[-1]
        keys = {i: key(text) for i, text in told.items()}
        fact["prompt_key"], fact["group_key"], fact["system_key"] = list(keys.values())[-1], key(row.group), 0
        if row.messages and row.messages[0]["role"] == "system":
            fact["system_key"] = _system_key(row.messages[0]["content"])
        wanted = list(keys) if turns == "all" else list(keys)[-1:]
        weights = {i: m["weight"] for i, m in enumerate(row.messages) if "weight" in m}
        fact["asks"] = [keys[i] for i in wanted if i not in weights or weights[i]]
    return fact


@lru_cache(maxsize=64)
def _system_key(text: str) -> int:
    return key(plain(text))
