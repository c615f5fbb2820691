"""One block of records, made into one part of the prepared data: checked, cleaned and tokenised, in any process.

A part is two Parquet files: `facts`, a line for every row that came in, from which all verdicts follow, and `rows`, the
tokens of those that can be kept. Equal bytes in give equal bytes out, so a part that exists need not be made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.cleaner import Cleaner, texts
from finetune.data.encoder import Encoder
from finetune.data.files import Block
from finetune.data.records import records
from finetune.data.rows import Row, prompt_key
from finetune.data.shape import conversation, grouped, renamed
from finetune.data.tokens import Tokens, cut, load_tokenizer, stop_tokens, vocabulary_rows, windows
from finetune.errors import DataError
from finetune.recipe import Data
from finetune.rundir import atomic_file

FACTS: dict[str, str] = {
    "line": "int64",
    "id": "string",
    "sha256": "string",
    "code": "string",
    "why": "string",
    "split": "string",
    "label": "string",
    "time": "string",
    "further": "bool",
    "place": "int64",
    "tokens": "int32",
    "trainable": "int32",
    "truncated": "bool",
    "need": "int32",
    "text_key": "uint64",
    "prompt_key": "uint64",
    "group_key": "uint64",
    "order_key": "uint64",
    "privacy": "string",
    "flags": "string",
    "language": "string",
    "benchmarks": "string",
}
"""Column -> type. `need` is the length that keeps the row's answer; `place` the order that a card has given it."""


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
    """One block and where its part goes."""

    block: Block | None
    """Raw records of a file; None where `rows` are given."""
    rows: list[Row]
    """Rows that a card has worded and split already."""
    kind: str
    """Format of the block's rows."""
    side: str
    """`train` or `heldout` where the file decides it, else empty."""
    prefix: str
    """What stands before ids, so that those of several files differ."""
    target: Path
    """The part's path without suffix."""


@dataclass(slots=True, kw_only=True)
class Made:
    """What the parent learns about a part."""

    target: Path
    """The part's path without suffix."""
    file: str
    """Name of its file."""
    facts: int
    """Rows that came in."""
    ignored: list[str] = field(default_factory=list)
    """Columns that have no meaning here."""


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

    def make(self, job: Job) -> None:
        """Writes the part of a block."""
        rows = list(self._rows(job))
        facts = [_fact(row) for row in rows]
        for row, fact in zip(rows, facts, strict=True):
            if not row.code:
                self.cleaner.clean(row, fact)
        good = [i for i, row in enumerate(rows) if not row.code]
        out: list[dict[str, Any]] = []
        for i, made in zip(good, self.encoder.encode([rows[i] for i in good]), strict=True):
            if isinstance(made, DataError):
                what = made.what.removeprefix(rows[i].where).strip(": ")
                rows[i].code, rows[i].why = made.code, f"{what}: {made.why}" if made.why else what
            else:
                out += self._tokens(rows[i], facts[i], made, i)
        for row, fact in zip(rows, facts, strict=True):
            fact |= {"code": row.code, "why": row.why, "split": row.split}
            if row.code:
                fact["truncated"] = False
        _write(job.target.with_suffix(".rows"), out, rows_schema())
        if self.work.near:
            self._signatures(job.target.with_suffix(".npy"), rows)
        file = job.block.file if job.block else rows[0].file
        told = json.dumps({"file": file, "ignored": sorted({name for row in rows for name in row.ignored})})
        # Last: its existence means that the part is there.
        _write(job.target.with_suffix(".facts"), facts, facts_schema().with_metadata({"finetune": told}))

    def _rows(self, job: Job) -> Iterable[Row]:
        if job.block is None:
            yield from job.rows
            return
        data, name = self.work.data, Path(job.block.file).name
        extra = tuple(key for key in (data.group_by, data.time_by) if key)
        for record in records(job.block):
            row = Row(file=job.block.file, line=record.line, id=f"{name}:{record.line}", sha256=record.sha256)
            row.split = job.side
            value = renamed(record.value, data.columns) if isinstance(record.value, dict) else record.value
            faults = list(record.faults) or conversation(row, value, job.kind, extra)
            faults = faults or grouped(row, value, data.group_by, data.time_by)
            row.id = job.prefix + row.id
            if faults:
                row.code, _, why = faults[0].partition(" @ ")
                row.why = "; ".join([why, *(fault.partition(" @ ")[2] for fault in faults[1:])])
            yield row

    def _tokens(self, row: Row, fact: dict[str, Any], tokens: Tokens, number: int) -> list[dict[str, Any]]:
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
                "fact": number,
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

    def _signatures(self, path: Path, rows: list[Row]) -> None:
        import numpy

        from finetune.data.near import signature

        with atomic_file(path) as partial, partial.open("wb") as handle:
            numpy.save(handle, numpy.stack([signature("\n".join(texts(r)) if not r.code else "") for r in rows]))


def rows_schema() -> Any:
    """Columns of the prepared rows; `fact` is the row's line in its part's facts."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("fact", pa.int32()),
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


def facts_schema() -> Any:
    """Columns of FACTS."""
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind if kind != "bool" else "bool_")()) for name, kind in FACTS.items()])


def key(text: str) -> int:
    """The first 64 bits of a text's sha256: rows, groups and questions are compared and ordered by it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _fact(row: Row) -> dict[str, Any]:
    fact: dict[str, Any] = dict.fromkeys(FACTS, "")
    fact |= {"line": row.line, "id": row.id, "sha256": row.sha256, "label": row.label, "time": row.time}
    fact |= dict.fromkeys(("tokens", "trainable", "need", "text_key", "prompt_key", "group_key"), 0)
    fact |= {"further": row.part > 1, "place": row.place, "truncated": False, "order_key": key(row.id)}
    if not row.code:
        words = re.findall(r"\w+", (row.fields["text"] if "text" in row.fields else "\n".join(texts(row))).lower())
        fact["text_key"] = key(" ".join(words) or repr(row.input_ids))
        fact["prompt_key"], fact["group_key"] = key(prompt_key(row)), key(row.group)
    return fact


def _write(target: Path, values: list[dict[str, Any]], schema: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with atomic_file(target) as partial:
        table = pa.Table.from_pylist(values, schema=schema)
        parquet.write_table(table, partial, compression="lz4", write_page_checksum=True)
