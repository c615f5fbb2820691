"""Whatever bytes stand in files of rows, evaluation items and their indexes, they end with a sentence or are read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetune.data import contamination
from finetune.data.files import blocks, sources
from finetune.data.items import Item, read_items
from finetune.data.part import Job, Maker, Work
from finetune.data.records import records
from finetune.data.rows import Row, read_messages
from finetune.data.shape import conversation, detect, grouped
from finetune.recipe import Data
from tests.fuzzing import Files, Parser, attempt, dumped, hunt, poked, strange

CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": [1, {"b": None}]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}], "id": "r", "group": 4},
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Sum?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "Hm."},
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "3", "weight": 1},
        ],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "no"}], "choices": ["yes", "no"]},
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two"},
        ],
        "tools": json.dumps([TOOL]),
    },
    {"instruction": "Say", "input": "it", "output": "It.", "history": [["a", "b"]], "system": "S"},
    {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
    {"prompt": "p", "completion": "c"},
    {"text": "Mail a.b@example.com, card 4111 1111 1111 1111, key AKIAABCDEFGHIJKLMNOP."},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "day": "2026-01-01"},
]
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


def read(folder: Path) -> None:
    """As the data stage reads a file, up to rows with their faults."""
    for source in sources([str(folder)]):
        for block in blocks(source, passage=50):
            for record in records(block):
                row = Row(file=source.name, line=record.line, id="x", sha256=record.sha256)
                kind = (detect(record.value) if isinstance(record.value, dict) else "") or "messages"
                if not record.faults and not conversation(row, record.value, kind, ("day",)):
                    grouped(row, record.value, "id" if "id" in record.value else "", "")


def written(values: list[Any], suffix: str) -> bytes:
    """Values as a file of a kind."""
    if suffix in (".jsonl", ".ndjson"):
        return b"\n".join(dumped(value) for value in values) + b"\n"
    if suffix == ".json":
        return b"[" + b",\n".join(dumped(value) for value in values) + b"]"
    if suffix == ".txt":
        return dumped(values)
    names = sorted({str(key) for value in values if isinstance(value, dict) for key in value}) or ["text"]
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writerow(names)
    for value in values:
        cells = [value.get(name, "") if isinstance(value, dict) else value for name in names]
        writer.writerow([c if isinstance(c, str) else dumped(c).decode("utf-8", "surrogatepass") for c in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def tables(values: list[dict[str, Any]]) -> dict[str, bytes]:
    """Rows of one format as Parquet and both forms of Arrow."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(values)
    made = {}
    for codec in ("snappy", "zstd", "none"):
        parquet.write_table(table, out := io.BytesIO(), compression=codec)
        made[f"{codec}.parquet"] = out.getvalue()
    for name, opened in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with opened(out := io.BytesIO(), table.schema) as sink:
            sink.write_table(table)
        made[name] = out.getvalue()
    return made


def packed(data: bytes, how: str) -> bytes:
    """Bytes squeezed by gzip or zstd."""
    import zstandard

    return gzip.compress(data, mtime=0) if how == ".gz" else zstandard.compress(data)


@cache
def text_seeds() -> list[Files]:
    return [{f"r{suffix}": written(ROWS[i : i + 2], suffix)} for suffix in TEXT_KINDS for i in (0, 1, 3, 4, 6, 8)]


@cache
def table_seeds() -> list[Files]:
    groups = [ROWS[0:1] * 3, [ROWS[3]], [ROWS[7]] * 40, [ROWS[8]]]
    return [{name: data} for group in groups for name, data in tables(group).items()]


@cache
def squeezed_seeds() -> list[Files]:
    return [{f"r.jsonl{how}": packed(written(ROWS[:2], ".jsonl"), how)} for how in (".gz", ".zst")]


def shaped_text(draw: random.Random) -> Files:
    """Rows with another value in some place, as one of the kinds."""
    values = [
        poked(draw.choice(ROWS), draw) if draw.randrange(9) else strange(draw) for _ in range(draw.choice((1, 2)))
    ]
    suffix = draw.choice(TEXT_KINDS)
    return {f"r{suffix}": written(values, suffix)}


def shaped_table(draw: random.Random) -> Files:
    """Rows with another value as Parquet or Arrow, where these can hold it; else bytes put together of two files."""
    import pyarrow as pa

    try:
        value = poked(draw.choice(ROWS), draw)
        made = tables([value if isinstance(value, dict) else {"messages": value}])
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError):
        made = {name: data for seed in table_seeds()[:10] for name, data in seed.items()}
    name = draw.choice(sorted(made))
    data = made[name]
    if draw.randrange(2):
        other = next(iter(draw.choice(table_seeds()).values()))
        cut = draw.randrange(len(data))
        data = data[:cut] + other[min(cut, len(other)) :]
    return {name: data}


def shaped_squeezed(draw: random.Random) -> Files:
    """Squeezed rows, squeezed twice, cut, or followed by something."""
    how = draw.choice((".gz", ".zst"))
    data = packed(next(iter(shaped_text(draw).values())), how)
    data = draw.choice((data, packed(data, how), data[:-1], data[: len(data) // 2], data + b"\0", data * 2, data[1:]))
    suffix = draw.choice((".jsonl", ".json", ".csv", ".txt"))
    return {f"r{suffix}{how}": data}


# --- rows as tokens -------------------------------------------------------------------------------------------------

LONG_RUNS = (
    "a", "1", "-", ".", "@", "a@", "a.", "1-", "1 ", "(", "AB12 ", "a\n", "\\n", "password=", "==", "é", "中",
    "\u200b",
    "```", "`", "<a ", "</", "00:", "2001:", "sk-", "eyJ", "key ", "1.1.1.", "+49 ", "DE89 ", "\"", "'", "/*",
    "<!--", "#",
)  # fmt: skip
"""Repeated many times, these make regular expressions go back and forth."""


@cache
def maker(folder: Path) -> Maker:
    """What makes tokens of rows, all checks of words on."""
    from tests.test_data import CHATML, make_tokenizer

    base = folder / "base"
    make_tokenizer(CHATML).save_pretrained(base)
    (base / "config.json").write_text('{"vocab_size": 300}')
    data = Data(max_length=512, privacy="redact", quality="drop", languages=["en"], benchmarks={}, too_long="cut")
    return Maker(Work(data=data, base=base, cut="cut", near=True))


@cache
def maker_folder() -> Path:
    import atexit
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="fuzz-base-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def make(folder: Path) -> None:
    """As the data stage makes a part."""
    for source in sources([str(folder)]):
        for block in blocks(source):
            for record in records(block):
                kind = (detect(record.value) if isinstance(record.value, dict) else "") or "messages"
                break
            maker(maker_folder()).make(Job(block=block, format=kind, side="train", prefix=""))


def shaped_words(draw: random.Random) -> Files:
    """A row that holds long runs of the same characters, or a strange value."""
    if not draw.randrange(3):
        return {"r.jsonl": written([poked(draw.choice(ROWS), draw)], ".jsonl")}
    text = "".join(draw.choice(LONG_RUNS) * draw.choice((1, 3, 300, 4000)) for _ in range(draw.choice((1, 2, 3))))
    answer = draw.choice((text, "Yes.", text[::-1]))
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"r.jsonl": written([draw.choice(({"messages": messages}, {"text": text}))], ".jsonl")}


# --- evaluation items and their index -------------------------------------------------------------------------------

ITEMS: list[dict[str, Any]] = [
    {
        "question": "What is the name of the large river in the north of the country?",
        "answer": "B",
        "choices": ["a", "b"],
    },
    {"messages": [{"role": "user", "content": "Say why."}, {"role": "assistant", "content": "Because it is so."}]},
    {"prompt": "def add(a, b):\n    return a + b  # the sum of both\n", "task_id": 3, "canonical_solution": "return 1"},
]
LINE = "the quick brown fox jumps over the lazy dog and runs away from all of them today"


@cache
def index_seeds() -> list[Files]:
    import tempfile

    found = []
    for kind, text in (("text", LINE), ("code", "def f(a, b): return a + b * 2 - f(b, a) if a > b else a")):
        with tempfile.TemporaryDirectory() as folder:
            contamination.build([Item(f"i{n}", f"{text} {n}") for n in range(3)], "set", kind).save(Path(folder) / "x")
            found.append({"x.index": (Path(folder) / "x").read_bytes()})
    return found


def shaped_index(draw: random.Random) -> Files:
    """An index whose own hash is right and whose arrays or facts are not."""
    import numpy as np

    with np.load(io.BytesIO(draw.choice(index_seeds())["x.index"])) as file:
        facts, arrays = json.loads(file["facts"].tobytes()), [file[n].copy() for n in ("keys", "entries", "texts")]
    which = draw.randrange(4)
    if which == 3 or draw.randrange(3) == 0:
        facts = poked(facts, draw)
    if which < 3 and len(arrays[which]):
        array = arrays[which]
        how = draw.randrange(5)
        if how == 0:
            arrays[which] = array[: draw.randrange(len(array))]
        elif how == 1:
            arrays[which] = array.view(np.uint8).astype(draw.choice(("f4", "i8", "u1", "U3")))
        elif how == 2:
            arrays[which] = array.reshape(1, -1)
        else:
            raw = bytearray(array.tobytes())
            raw[draw.randrange(len(raw))] = draw.choice((0, 255, 128, 1))
            arrays[which] = np.frombuffer(bytes(raw), array.dtype)
    if isinstance(facts, dict) and draw.randrange(8):
        facts["sha256"] = contamination._sha256(*arrays)
    out = io.BytesIO()
    told = np.frombuffer(dumped(facts), np.uint8)
    np.savez(out, allow_pickle=False, facts=told, keys=arrays[0], entries=arrays[1], texts=arrays[2])
    return {"x.index": out.getvalue()}


def ask_index(folder: Path) -> None:
    """As training rows are looked up in it."""
    index = contamination.load(folder / "x.index")
    index.limits()
    for text in (LINE, f"{LINE} 1", f"{LINE} {LINE}", "def f(a, b): return a + b * 2 - f(b, a) if a > b else a"):
        index.hits(text)


DEEP = b"[" * 980 + b"]" * 980

PARSERS = [
    Parser(
        name="rows: JSONL, JSON, CSV, text",
        weight=30,
        examples=[
            ({"r.jsonl": b'{"conversations": [{"from": [], "value": "a"}]}'}, ""),
            ({"r.csv": b"messages\n" + DEEP}, ""),
        ],
        parse=read,
        seeds=text_seeds,
        shaped=shaped_text,
    ),
    Parser(name="rows: Parquet, Arrow", weight=12, parse=read, seeds=table_seeds, shaped=shaped_table, native=True),
    Parser(
        name="rows: gzip, zstd",
        weight=12,
        examples=[({"r.jsonl.gz": gzip.compress(b'{"text": "a"}', mtime=0)[:10] + b"\x07"}, "DATA-006")],
        parse=read,
        seeds=squeezed_seeds,
        shaped=shaped_squeezed,
    ),
    Parser(
        name="messages of a file",
        weight=20,
        examples=[
            ({"r.jsonl": b'{"messages": [{"role": "user", "content": "a"}], "tools": ' + DEEP + b"}"}, "DATA-022"),
            (
                {
                    "r.jsonl": b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "'
                    + DEEP
                    + b'"}]}]}'
                },
                "DATA-025",
            ),
        ],
        parse=lambda folder: read_messages(folder / "r.jsonl"),
        seeds=lambda: [{"r.jsonl": written(ROWS[:3], ".jsonl")}],
        shaped=lambda draw: {"r.jsonl": written([poked(draw.choice(ROWS[:3]), draw)], ".jsonl")},
    ),
    Parser(
        name="rows as tokens",
        weight=1,
        parse=make,
        seeds=lambda: [{"r.jsonl": written([row], ".jsonl")} for row in ROWS],
        shaped=shaped_words,
    ),
    Parser(
        name="evaluation items",
        weight=20,
        parse=lambda folder: read_items(folder / "i.jsonl"),
        seeds=lambda: [{"i.jsonl": written(ITEMS, ".jsonl")}],
        shaped=lambda draw: {"i.jsonl": written([poked(draw.choice(ITEMS), draw)], ".jsonl")},
    ),
    Parser(name="index of an evaluation set", weight=10, parse=ask_index, seeds=index_seeds, shaped=shaped_index),
]
EXAMPLES = 60


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
@pytest.mark.parametrize("shaped", [False, True], ids=["bytes", "values"])
def test_strange_rows_end_with_a_sentence_or_are_read(parser: Parser, shaped: bool, tmp_path: Path) -> None:
    hunt(parser, tmp_path, EXAMPLES, shaped=shaped)


@pytest.mark.parametrize(
    ("parser", "files", "code"), [(parser, *example) for parser in PARSERS for example in parser.examples]
)
def test_what_once_went_wrong_ends_with_its_sentence(parser: Parser, files: Files, code: str, tmp_path: Path) -> None:
    assert attempt(parser, tmp_path, files) == code
