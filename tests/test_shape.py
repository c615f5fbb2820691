"""Every format becomes the same conversations, and every fault a row can have is named by file, line and field."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.data.files import LINE_LIMIT, blocks, sources
from finetune.data.prepare import prepared
from finetune.data.records import records
from finetune.data.rows import Row
from finetune.data.shape import FORMATS, conversation, detect
from finetune.errors import DataError
from finetune.recipe import Data, Recipe
from tests.test_data import conversation as talk
from tests.test_data import jsonl, qa

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def messages(*given: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(given), **more}).encode()


# What a line is -> its code and what must stand in its sentence. Good rows stand between them.
FAULTS: list[tuple[bytes, str, str]] = [
    (b"{not json", "DATA-022", "is not JSON"),
    (b'{"messages": [', "DATA-022", "is not JSON"),
    (b'["a"]', "DATA-001", "is list, expected an object"),
    (b'"text"', "DATA-001", "is str, expected an object"),
    (b"7", "DATA-001", "is int, expected an object"),
    (b"null", "DATA-001", "is missing, expected an object"),
    (b'{"messages": NaN}', "DATA-022", "NaN, which is not JSON"),
    (b'\xff\xfe{"a": 1}', "DATA-021", "is not UTF-8 at byte 0"),
    (messages(USER, ASSISTANT)[:-1] + b', "x": "\xe9"}', "DATA-021", "is not UTF-8 at byte"),
    (b"\xef\xbb\xbf" + messages(USER, ASSISTANT), "DATA-021", "byte order mark"),
    (messages(USER, ASSISTANT).replace(b"q", b"q\x00"), "DATA-021", "NUL byte"),
    (messages(USER, ASSISTANT).replace(b'"q"', b'"\\ud800"'), "DATA-021", "half of a surrogate pair"),
    (b'{"messages": [], "messages": []}', "DATA-023", "the key 'messages' twice"),
    (b'{"mesages": []}', "DATA-026", "has no key 'messages', expected messages as in the rows before it, did you mean"),
    (b'{"instruction": "q", "output": "a"}', "DATA-026", "is in the format alpaca"),
    (b'{"messages": "text"}', "DATA-001", "messages is str, expected list"),
    (b'{"messages": []}', "DATA-001", "messages is an empty list"),
    (messages("hello"), "DATA-001", "messages[0] is str, expected dict"),
    (messages({"content": "q"}, ASSISTANT), "DATA-001", "messages[0].role is missing"),
    (messages({"role": "human", "content": "q"}, ASSISTANT), "DATA-001", "messages[0].role is 'human'"),
    (messages({"role": 7, "content": "q"}, ASSISTANT), "DATA-001", "messages[0].role is int"),
    (messages(USER, {"role": "assistant"}), "DATA-001", "messages[1].content is missing"),
    (messages({"role": "user", "content": ["x"]}, ASSISTANT), "DATA-001", "messages[0].content is list, expected str"),
    (messages(USER, {"role": "assistant", "content": {"a": 1}}), "DATA-001", "messages[1].content is dict"),
    (messages(USER, {"role": "assistant", "content": " "}), "DATA-003", "messages[1].content is empty"),
    (messages(USER), "DATA-003", "no assistant message at its end"),
    (messages(USER, ASSISTANT, USER), "DATA-003", "no assistant message at its end"),
    (messages(USER, USER, ASSISTANT), "DATA-004", "messages[1].role is user behind user, expected assistant"),
    (messages(USER, ASSISTANT, ASSISTANT), "DATA-004", "messages[2].role is assistant behind assistant"),
    (messages(ASSISTANT), "DATA-004", "messages[0].role is assistant at the beginning, expected user"),
    (messages(USER, {"role": "system", "content": "s"}, ASSISTANT), "DATA-004", "messages[1].role is system"),
    (messages(USER, ASSISTANT | {"labell": 1}), "DATA-002", "messages[1] has the unknown key 'labell'"),
    (messages(USER, ASSISTANT | {"weight": 0.5}), "DATA-001", "messages[1].weight is float, expected 0 or 1"),
    (messages(USER | {"weight": 1}, ASSISTANT), "DATA-001", "weight stands at user"),
    (messages(USER, ASSISTANT | {"weight": 0}), "DATA-003", "every assistant message the weight 0"),
    (messages(USER, ASSISTANT, id=True), "DATA-001", "id is bool, expected str or int"),
    (messages(USER, ASSISTANT, group=[1]), "DATA-001", "group is list"),
    (messages(USER, ASSISTANT, choice=["a"]), "DATA-002", "unknown key 'choice', did you mean 'choices'?"),
    (messages(USER, ASSISTANT, choices="a"), "DATA-001", "choices is str, expected list of str"),
    (messages(USER, ASSISTANT, choices=["b", "c"]), "DATA-010", "the answer is not one of its choices"),
    (messages(USER, ASSISTANT, tools="["), "DATA-025", "tools is str, expected list"),
    (messages(USER, ASSISTANT, tools=[{"type": "function"}]), "DATA-025", "tools[0].function.name is missing"),
    (messages(USER, ASSISTANT | {"tool_calls": "x"}), "DATA-025", "messages[1].tool_calls is str"),
    (
        messages(USER, ASSISTANT | {"tool_calls": [{"function": {"name": "look", "arguments": "{"}}]}),
        "DATA-025",
        "messages[1].tool_calls[0].function.arguments is no JSON",
    ),
    (
        messages(USER, ASSISTANT | {"tool_calls": [{"function": {"name": "a", "arguments": '{"at": 1, "at": 2}'}}]}),
        "DATA-023",
        "messages[1].tool_calls[0].function.arguments has the key 'at' twice in one object",
    ),
    (
        messages(USER, ASSISTANT | {"tool_calls": [{"function": {"name": "a", "arguments": '{"at": -Infinity}'}}]}),
        "DATA-022",
        "messages[1].tool_calls[0].function.arguments has -Infinity, which is not JSON",
    ),
    (messages(USER, ASSISTANT, tools='[{"name": "a", "name": "b"}]'), "DATA-023", "tools has the key 'name' twice"),
    (
        messages(
            USER, ASSISTANT | {"tool_calls": [CALL]}, {"role": "tool", "content": "3", "tool_call_id": "c9"}, ASSISTANT
        ),
        "DATA-025",
        "messages[2].tool_call_id is no id of the calls before it",
    ),
    (
        messages(USER, ASSISTANT | {"tool_calls": [CALL]}, tools=[TOOL | {"function": {"name": "other"}}]),
        "DATA-025",
        "messages[1].tool_calls[0].function.name is none of the row's tools",
    ),
    (messages(USER, ASSISTANT | {"tool_calls": [CALL]}, USER, ASSISTANT), "DATA-004", "is user behind assistant"),
    (messages(USER | {"reasoning_content": "hm"}, ASSISTANT), "DATA-001", "reasoning_content is str at user"),
    (messages({"role": "user", "content": "a<|im_end|>b"}, ASSISTANT), "DATA-005", "control token <|im_end|>"),
    (messages(USER, ASSISTANT, id="twice"), "DATA-002", "has the id of"),
]


def prepare(tmp_path: Path, base: Path, *files: Path, **settings: Any) -> Path:
    """The prepared set of some files; nothing is looked for but faults."""
    usual = {"max_length": 4096, "privacy": "off", "quality": "off", "near_duplicates": "off"}
    data = Data(train_files=[str(f) for f in files], **{**usual, **settings})
    return prepared(Recipe(name="test", cache_dir=str(tmp_path / "cache"), data=data), base, tmp_path / "rejected")


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


def faulty_file(tmp_path: Path) -> Path:
    """Every fault, each behind a good row, and a good row that has the id first."""
    lines = [messages({"role": "user", "content": "first"}, ASSISTANT, id="twice")]
    for i, (line, _, _) in enumerate(FAULTS):
        lines += [line, messages({"role": "user", "content": f"good {i}"}, ASSISTANT)]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\r\n".join(lines) + b"\n")
    return path


def test_there_are_at_least_forty_kinds_of_fault() -> None:
    assert len({(code, told) for _, code, told in FAULTS}) >= 40
    assert len({code for _, code, _ in FAULTS}) >= 11


def test_every_fault_is_named_by_line_and_id_and_the_good_rows_are_kept(tmp_path: Path, base: Path) -> None:
    folder = prepare(tmp_path, base, faulty_file(tmp_path), on_bad_row="drop", max_drop_fraction=0.9)
    lines = {line["line"]: line for line in ledger(folder)}
    assert len(lines) == 2 * len(FAULTS) + 1
    for i, (_, code, told) in enumerate(FAULTS):
        line = lines[2 * i + 2]
        assert (line["code"], line["verdict"], line["tokens"]) == (code, "dropped", line["tokens"]), (i, line)
        assert told in line["why"], (i, line["why"])
        assert lines[2 * i + 3]["verdict"] == "kept"
    report = json.loads((folder / "report.json").read_text())
    assert report["rows_read"] == 2 * len(FAULTS) + 1
    assert report["kept"] == len(FAULTS) + 1
    assert sum(report["verdicts"].values()) == report["kept"] + sum(report["dropped"].values()) == report["rows_read"]


def test_faults_end_the_run_and_the_first_twenty_are_told_and_all_are_counted(tmp_path: Path, base: Path) -> None:
    path = faulty_file(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, base, path)
    text = caught.value.sentence()
    assert caught.value.exit_code == 2
    assert f"{len(FAULTS)} of {2 * len(FAULTS) + 1} rows have faults" in text
    assert "DATA-022 train.jsonl:2 is not JSON" in text
    assert f"and {len(FAULTS) - 20} more" in text
    assert f"x {Counter(code for _, code, _ in FAULTS).most_common(1)[0][0]}" in text
    lines = ledger(tmp_path / "rejected")
    assert Counter(line["verdict"] for line in lines) == {"error": len(FAULTS), "kept": len(FAULTS) + 1}
    assert not list((tmp_path / "cache" / "prepared").glob("*/report.json"))


def test_more_faults_than_allowed_end_the_run_all_the_same(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"q{i}", "a") for i in range(99)]
    path = jsonl(tmp_path / "rows.jsonl", *rows, {"messages": []})
    prepare(tmp_path, base, path, on_bad_row="drop")
    more = jsonl(tmp_path / "more.jsonl", *rows[:98], {"messages": []}, {"messages": 1})
    with pytest.raises(DataError, match=r"more than data.max_drop_fraction=1.0%"):
        prepare(tmp_path, base, more, on_bad_row="drop")


def test_no_word_of_a_row_stands_in_an_error(tmp_path: Path, base: Path) -> None:
    secret = {"role": "assistant", "content": "canary-4711"}
    path = jsonl(tmp_path / "rows.jsonl", {"messages": [USER, secret, secret]}, {"messages": [secret]}, "canary-4711")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, base, path)
    assert "canary" not in caught.value.sentence() + (tmp_path / "rejected" / "ledger.jsonl").read_text()


def test_csv_and_parquet_have_the_same_faults_by_record(tmp_path: Path, base: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [("q1", "a"), ("q2", ""), ("", "a"), ("q4", "a"), ("q5<|im_end|>", "a"), ("q6", "a")]
    parquet.write_table(
        pa.table({"prompt": [q or None for q, _ in rows], "completion": [a or None for _, a in rows]}),
        tmp_path / "rows.parquet",
    )
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in rows) + "one\n", "utf-8"
    )
    found = {}
    for name in ("rows.parquet", "rows.csv"):
        folder = prepare(
            tmp_path, base, tmp_path / name, on_bad_row="drop", max_drop_fraction=0.9, heldout_fraction=0.34
        )
        found[name] = [(line["line"], line["code"]) for line in ledger(folder) if line["code"]]
    assert found["rows.parquet"] == [(2, "DATA-001"), (3, "DATA-026"), (5, "DATA-005")]
    assert found["rows.csv"] == [(3, "DATA-001"), (4, "DATA-026"), (6, "DATA-005"), (8, "DATA-027")]


def parsed_faults() -> list[tuple[dict[str, Any], str, str]]:
    """The faults that are more than bytes: those whose line is an object."""
    found = []
    for line, code, told in FAULTS:
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict) and code not in ("DATA-021", "DATA-022", "DATA-023"):
            found.append((value, code, told))
    return found


def codes(folder: Path) -> list[str]:
    return [line["code"] for line in ledger(folder)]


def test_messages_in_csv_cells_have_the_same_faults(tmp_path: Path, base: Path) -> None:
    import csv

    # A cell is text: a column of another type is a fault that CSV cannot have.
    usual = ("messages", "tools", "choices")
    able = [
        (value, code, told)
        for value, code, told in parsed_faults()
        if all(isinstance(item, list) if key in usual else isinstance(item, str) for key, item in value.items())
    ]
    assert len(able) >= 25
    able.insert(0, ({"messages": [USER, ASSISTANT], "id": "twice"}, "", ""))
    names = sorted({key for value, _, _ in able for key in value})
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        for value, _, _ in able:
            writer.writerow({k: json.dumps(item) if isinstance(item, list) else item for k, item in value.items()})
    other = [{"messages": [USER | {"content": f"good {i}"}, ASSISTANT]} for i in range(9)]
    good = jsonl(tmp_path / "good.jsonl", *other)
    folder = prepare(tmp_path, base, tmp_path / "rows.csv", good, on_bad_row="drop", max_drop_fraction=0.95)
    assert codes(folder)[: len(able)] == [code for _, code, _ in able]


TURNS = json.dumps([USER, ASSISTANT])
CELLS: list[tuple[bytes, str, str]] = [
    (TURNS[:-1].encode(), "DATA-022", "messages is not JSON: Expecting ',' delimiter at character"),
    (b"[" * 3000 + b"]" * 3000, "DATA-022", "messages is not JSON that can be read: nested too deeply"),
    (b'[{"role": "user", "content": "q"}, NaN]', "DATA-022", "messages has NaN, which is not JSON"),
    (TURNS.replace('"q"', '"q", "role": "user"').encode(), "DATA-023", "messages has the key 'role' twice"),
    (TURNS.replace('"q"', '"\\ud800"').encode(), "DATA-021", "half of a surrogate pair"),
    (TURNS.replace('"q"', '"q\0"').encode(), "DATA-021", "messages has a NUL byte"),
    (TURNS.replace('"q"', '"\u00e9"').encode("latin-1"), "DATA-021", "messages is not UTF-8"),
]
"""Cell of a column with JSON -> its code and what must stand in its sentence."""


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_json_in_a_cell_is_looked_at_as_a_line_is(tmp_path: Path, base: Path, suffix: str) -> None:
    between = b"\t" if suffix == "tsv" else b","
    cells = [*(cell for cell, _, _ in CELLS), *(TURNS.replace("q", f"good {i}").encode() for i in range(9))]
    lines = [between.join((b"id", b"messages"))]
    lines += [between.join((str(i).encode(), b'"' + c.replace(b'"', b'""') + b'"')) for i, c in enumerate(cells)]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\n".join(lines) + b"\n")
    folder = prepare(tmp_path, base, path, on_bad_row="drop", max_drop_fraction=0.9, heldout_fraction=0.3)
    found = ledger(folder)
    assert codes(folder) == [code for _, code, _ in CELLS] + [""] * 9
    for line, (_, _, told) in zip(found, CELLS, strict=False):
        assert told in line["why"]


@pytest.mark.parametrize("text", ["[1] is what?", "{name} is whose?", '{"a": 1}', "[1, 2]", '[{"a": 1}]', "[]", "[NaN"])
def test_a_text_in_a_cell_may_begin_as_json_does(tmp_path: Path, text: str) -> None:
    import csv

    turns = json.dumps([USER])
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([("prompt", "completion"), (text, text), (turns, json.dumps([ASSISTANT]))])
    plain, talked = (r for block in blocks(sources([str(tmp_path / "rows.csv")])[0]) for r in records(block))
    assert (plain.value, plain.faults) == ({"prompt": text, "completion": text}, ())
    assert read(plain.value, "prompt_completion").messages == talk(text, text)
    assert read(talked.value, "prompt_completion").messages == [USER, ASSISTANT]


def test_messages_in_a_prompt_are_looked_at_as_json(tmp_path: Path) -> None:
    turns = json.dumps([USER]).replace('"q"', '"q", "role": "user"').replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'prompt,completion\n"{turns}",a\n', encoding="utf-8")
    (found,) = (r for block in blocks(sources([str(tmp_path / "rows.csv")])[0]) for r in records(block))
    assert found.faults == ("DATA-023 @ prompt has the key 'role' twice in one object",)


def test_a_cell_with_json_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    row = {"messages": json.dumps([USER, ASSISTANT]), "prompt": json.dumps([USER]), "tools": json.dumps([TOOL])}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    csv.write_csv(pa.Table.from_pylist([row]), tmp_path / "rows.csv")
    seen: list[str] = []
    loads = json.loads
    monkeypatch.setattr("json.loads", lambda text, **more: (seen.append(text), loads(text, **more))[1])
    for name in ("rows.parquet", "rows.csv"):
        seen.clear()
        (found,) = (r for block in blocks(sources([str(tmp_path / name)])[0]) for r in records(block))
        assert found.value == {"messages": [USER, ASSISTANT], "prompt": [USER], "tools": [TOOL]}
        assert [seen.count(cell) for cell in row.values()] == [1, 1, 1], name


@pytest.mark.parametrize("column", ["messages", "prompt", "tools", "conversations"])
def test_json_in_a_cell_of_parquet_is_looked_at_as_a_line_is(tmp_path: Path, column: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    twice = json.dumps([USER]).replace('"q"', '"q", "role": "user"')
    parquet.write_table(pa.table({"id": ["a", "b"], column: [json.dumps([USER]), twice]}), tmp_path / "rows.parquet")
    good, bad = (r for block in blocks(sources([str(tmp_path / "rows.parquet")])[0]) for r in records(block))
    assert good.value == {"id": "a", column: [USER]}
    assert bad.faults == (f"DATA-023 @ {column} has the key 'role' twice in one object",)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (
            '{"name": "look", "name": "b", "arguments": {}}',
            "DATA-023 @ conversations[1].value has the key 'name' twice",
        ),
        ('{"name": "look", "arguments": {"a": NaN}}', "DATA-022 @ conversations[1].value has NaN, which is not JSON"),
        ('{"name": "look", "arguments": 7}', "DATA-025 @ conversations[1].value is no JSON with name and arguments"),
        ("look", "DATA-025 @ conversations[1].value is no JSON with name and arguments"),
    ],
)
def test_a_function_call_as_text_is_looked_at_as_a_line_is(call: str, fault: str) -> None:
    turns = [("human", "q"), ("function_call", call), ("observation", "3"), ("gpt", "a")]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    (found,) = conversation(Row(file="f", line=1, id="", sha256=""), value, "sharegpt")
    assert found.startswith(fault)


def test_a_parquet_file_has_no_faults_of_bytes(tmp_path: Path, base: Path) -> None:
    """Arrow's texts are UTF-8 and its objects have each name once: a file of others is refused whole."""
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    parquet.write_table(pa.table({"prompt": texts, "completion": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"DATA-006 rows\.parquet cannot be read"):
        prepare(tmp_path, base, tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_whose_name_is_no_text_is_one_sentence(tmp_path: Path, base: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / f"rows.{kind}"
    for table in (pa.table({"name": ["a"]}), pa.Table.from_pylist([{"messages": [{"name": "a"}]}])):
        if kind == "parquet":
            parquet.write_table(table, path, store_schema=False)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        path.write_bytes(path.read_bytes().replace(b"name", b"n\xe9me"))
        with pytest.raises(DataError, match=rf"DATA-006 rows\.{kind} cannot be read"):
            prepare(tmp_path, base, path)


def test_messages_in_parquet_have_the_same_faults(tmp_path: Path, base: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # All rows of a Parquet file have one type, so only faults of that type can exist: roles, contents, order, tools.
    plain = {"role", "content", "tool_calls", "tool_call_id"}
    able = []
    for value, code, told in parsed_faults():
        found = value["messages"] if "messages" in value else None
        rows = isinstance(found, list) and all(isinstance(m, dict) and set(m) <= plain for m in found)
        if not rows or set(value) - {"messages", "id"} or isinstance(value.get("id"), bool):
            continue
        if all(isinstance(item, str) for m in found for key, item in m.items() if key != "tool_calls") and not any(
            isinstance(m.get("tool_calls"), str) for m in found
        ):
            able.append((value, code, told))
    assert len(able) >= 12
    able.insert(0, ({"messages": [USER, ASSISTANT], "id": "twice"}, "", ""))
    other = [{"messages": [USER | {"content": f"good {i}"}, ASSISTANT]} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist([*(value for value, _, _ in able), *other]), tmp_path / "rows.parquet")
    folder = prepare(tmp_path, base, tmp_path / "rows.parquet", on_bad_row="drop", max_drop_fraction=0.95)
    assert codes(folder)[: len(able)] == [code for _, code, _ in able]


def test_a_quoted_cell_over_several_lines_does_not_move_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",a\nq,b\n', encoding="utf-8")
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert [(r.line, r.value["completion"]) for r in found] == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.jsonl", b"\n\n", "have no rows"),
        ("wide.jsonl", "{}\n".encode("utf-16"), "UTF-16"),
        ("cut.jsonl.gz", gzip.compress(json.dumps(qa("q", "a")).encode() * 9999)[:-40], "cannot be read"),
        ("none.jsonl.gz", b"no gzip", "cannot be read"),
        ("none.jsonl.zst", b"no zstd", "cannot be read"),
        ("cut.parquet", b"PAR1 and nothing", "cannot be read"),
        ("cut.arrow", b"ARROW1", "cannot be read"),
        ("object.json", b'[{"a": 1', "cannot be read"),
        ("twice.csv", b"prompt,prompt\na,b\n", "names 'prompt' twice"),
        ("open.csv", b'prompt,completion\n"a,b\n', "cannot be read"),
        ("rows.xlsx", b"PK", "unknown kind"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, base: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"DATA-006 .*{told}"):
        prepare(tmp_path, base, tmp_path / name)


@pytest.mark.parametrize(
    ("content", "told", "fix"),
    [
        (json.dumps({"data": [qa("q", "a")] * 9}, indent=2), "is one object with its rows under 'data'", ".data[]"),
        (json.dumps({"v": 1, "data": [qa("q", "a")] * 9}), "is one object with its rows under 'data'", ".data[]"),
        ('{"rows": [\n{"a": 1},\n{"a": 2}\n]}\n', "is one object with its rows under 'rows'", ".rows[]"),
        (json.dumps({"my rows": [qa("q", "a")]}, indent=1), "is one object with its rows under 'my rows'", "that list"),
        (json.dumps(qa("q", "a"), indent=2), "begins with an object over several lines", "jq -c . "),
        (json.dumps(qa("q", "a"), indent=2) * 9, "begins with an object over several lines", "jq -c . "),
        (json.dumps({"version": 1}, indent=2), "begins with an object over several lines", "jq -c . "),
    ],
)
def test_one_object_in_a_json_file_is_one_sentence(
    tmp_path: Path, base: Path, content: str, told: str, fix: str
) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=f"DATA-006 rows.json {told}: a .json file is a list of rows") as caught:
        prepare(tmp_path, base, tmp_path / "rows.json")
    assert fix in caught.value.fix
    assert "\n" not in caught.value.sentence()


def test_one_row_on_one_line_of_a_json_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (json.dumps(qa("q", "a")), json.dumps({"talk": talk("q", "a")}), '{"a": [1]}', '{"a": {}}\n{"b": 1}'):
        path.write_text(text)
        found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
        assert [r.value for r in found] == [json.loads(line) for line in text.splitlines()]
    path.write_text('{"a": \n{"b": 1}\n')
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert [len(r.faults) for r in found] == [1, 0]


def broken_files(folder: Path) -> dict[Path, int]:
    """Files that break off, each with the line at which it does; 30 rows come before that."""
    import zstandard

    rows = [qa(f"question {i}", f"answer {i}") for i in range(30)]
    noise = "".join(f"{hash((i, 7)):x}" for i in range(40_000))  # what is squeezed is read in pieces
    whole = "".join(json.dumps(row) + "\n" for row in [*rows, qa(noise, "a")]).encode()
    plain = "".join(f'"question {i}\n","answer {i}"\n' for i in range(30))
    made = {
        "a.jsonl.gz": (gzip.compress(whole)[:-9000], 31),
        "b.jsonl.zst": (zstandard.compress(whole)[:-9000], 31),
        "c.json": (b"[" + b",\n".join(json.dumps(row).encode() for row in rows) + b',\n\n {"messages": oops}, {}]', 32),
        "d.json": (b"[" + b",\n".join(json.dumps(row).encode() for row in rows) + b",", 30),
        "e.csv": (f'prompt,completion\n{plain}"question,answer\nq,a\n'.encode(), 62),
        "f.csv": (f'prompt,completion\n{plain}"question" mark,answer\nq,a\n'.encode(), 62),
    }
    for name, (content, _) in made.items():
        (folder / name).write_bytes(content)
    return {folder / name: line for name, (_, line) in made.items()}


def test_a_file_that_breaks_off_has_a_fault_there_and_what_came_before_is_kept(tmp_path: Path, base: Path) -> None:
    for path, line in broken_files(tmp_path).items():
        settings: dict[str, Any] = {"on_bad_row": "drop", "max_drop_fraction": 0.04, "heldout_fraction": 0.3}
        *kept, last = ledger(prepare(tmp_path, base, path, **settings))
        assert [one["verdict"] for one in kept] == ["kept"] * 30, path.name
        assert (last["line"], last["code"], last["verdict"]) == (line, "DATA-006", "dropped"), path.name
        assert last["why"].startswith("cannot be read, nor anything behind it: ")
        with pytest.raises(DataError, match=rf"DATA-006 {path.name}:{line} cannot be read, nor anything behind it"):
            prepare(tmp_path, base, path)
        assert len(ledger(tmp_path / "rejected")) == 31
        with pytest.raises(DataError, match=r"more than data\.max_drop_fraction"):
            prepare(tmp_path, base, path, **settings | {"max_drop_fraction": 0.03})


def test_a_line_that_is_too_long_is_a_fault_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (LINE_LIMIT + 5) + b'"}\n' + messages(USER, ASSISTANT) + b"\n")
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert [r.line for r in found] == [1, 2]
    assert found[0].faults[0].startswith(f"DATA-024 @ has {LINE_LIMIT + 15:,} bytes")
    assert not found[1].faults


def test_a_file_that_ends_inside_a_row_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(messages(USER, ASSISTANT) + b"\n" + messages(USER, ASSISTANT)[:20])
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert found[1].faults[0].endswith("the file ends inside this row")


def test_byte_order_mark_and_windows_line_ends_are_no_faults(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(qa(f"q{i}", "a")).encode() for i in range(20)) + b"\r\n")
    assert json.loads((prepare(tmp_path, base, path) / "report.json").read_text())["kept"] == 20


# --- formats

SAME = [{"role": "system", "content": "s"}, *talk("q", "a")]
IN_EVERY_FORMAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": SAME},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
    "prompt_completion": {"prompt": "q", "completion": "a", "system": "s"},
}


def read(value: dict[str, Any], kind: str) -> Row:
    row = Row(file="f", line=1, id="f:1", sha256="")
    assert conversation(row, value, kind) == []
    return row


@pytest.mark.parametrize("kind", IN_EVERY_FORMAT)
def test_every_format_of_conversations_is_detected_and_becomes_the_same(kind: str) -> None:
    assert detect(IN_EVERY_FORMAT[kind]) == kind
    assert read(IN_EVERY_FORMAT[kind], kind).messages == SAME


def test_plain_text_and_tokens_are_formats_too() -> None:
    assert set(FORMATS) == {*IN_EVERY_FORMAT, "text", "tokens"}
    assert detect({"text": "x"}) == "text"
    assert read({"text": "x"}, "text").text == "x"
    row = read({"input_ids": [1, 2], "labels": [-100, 2]}, detect({"input_ids": [1, 2]}))
    assert (row.input_ids, row.labels) == ([1, 2], [-100, 2])
    for wrong in ({"input_ids": ["1"]}, {"input_ids": [1], "labels": [2]}, {"input_ids": [1, 2], "labels": [1]}):
        assert conversation(Row(file="f", line=1, id="", sha256=""), wrong, "tokens")[0].startswith("DATA-028")
    for idle in ({"input_ids": [5, 6, 7], "labels": [5, -100, -100]}, {"input_ids": [5]}):
        (fault,) = conversation(Row(file="f", line=1, id="", sha256=""), idle, "tokens")
        assert fault == "DATA-003 @ labels has no trained token behind the first, which nothing can predict"


def test_openai_tool_calls_become_what_templates_want() -> None:
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = read(
        {"messages": [*turns, {"role": "tool", "content": "3", "tool_call_id": "c1"}, ASSISTANT], "tools": [TOOL]},
        "messages",
    )
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert row.tools == [TOOL]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    other = read(sharegpt, "sharegpt")
    assert other.tools == [TOOL]
    assert other.messages[1]["tool_calls"][0]["function"] == row.messages[1]["tool_calls"][0]["function"]


def test_arguments_that_arrow_adds_to_calls_are_no_arguments(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    given = [{"zip": "75", "near": [{"a": 1}]}, {"city": "Oslo", "near": [{"b": 2}]}]
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": one}}]}]}
        for one in given
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        found = [r.value for block in blocks(sources([str(tmp_path / name)])[0]) for r in records(block)]
        calls = [read(value, "messages").messages[1]["tool_calls"][0]["function"] for value in found]
        assert [call["arguments"] for call in calls] == given
    null = {"function": {"name": "look", "arguments": {"zip": None}}}
    row = read({"messages": [USER, {"role": "assistant", "tool_calls": [null]}]}, "messages")
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zip": None}


def test_openais_developer_is_the_system() -> None:
    told = [{"role": "developer", "content": "s"}, *talk("q", "a")]
    assert read({"messages": told}, "messages").messages == SAME
    row = Row(file="f", line=1, id="f:1", sha256="")
    faults = conversation(row, {"messages": [*SAME[:1], *told]}, "messages")
    assert faults == ["DATA-004 @ messages[1].role is system behind system, expected user"]


def test_what_the_assistant_said_in_a_prompt_is_not_learnt() -> None:
    row = read(
        {"prompt": talk("q", "a", "q2"), "completion": [{"role": "assistant", "content": "b"}]}, "prompt_completion"
    )
    assert [m.get("weight") for m in row.messages if m["role"] == "assistant"] == [0, None]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, base: Path) -> None:
    import pyarrow as pa
    import zstandard
    from datasets import Dataset
    from pyarrow import parquet

    rows = [qa(f"question {i}", f"answer {i}") for i in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "e.json").write_bytes(text)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    with (tmp_path / "g.csv").open("w", encoding="utf-8") as handle:
        import csv

        writer = csv.writer(handle)
        writer.writerow(["messages"])
        writer.writerows([json.dumps(row["messages"])] for row in rows)
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.json", "f.parquet", "saved", "g.csv", "?.jsonl"]
    seen = set()
    for name in names:
        folder = prepare(tmp_path, base, tmp_path / name)
        report = json.loads((folder / "report.json").read_text())
        assert report["kept"] == 12
        seen.add((report["splits"]["train"]["tokens"], report["splits"]["train"]["trainable_tokens"]))
    assert len(seen) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_that_every_row_has_are_no_misspelt_ones(tmp_path: Path, base: Path, suffix: str) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    extra = ("idx", "uid", "qid", "pid", "group_id", "choice", "prompts")
    rows: list[dict[str, Any]] = [
        {"prompt": f"q{i}", "completion": "a"} | {name: f"{name} {i}" for name in extra} for i in range(12)
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        jsonl(path, *rows)
    else:
        (csv.write_csv if suffix == "csv" else parquet.write_table)(pa.Table.from_pylist(rows), path)
    notes = json.loads((prepare(tmp_path, base, path, heldout_fraction=0.3) / "report.json").read_text())["notes"]
    assert notes[-1] == f"columns without a meaning here: {', '.join(sorted(extra))}"


def test_a_column_that_one_row_has_is_a_misspelt_one(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"q{i}", "a", uid=i, group_id=i) for i in range(12)]
    rows[3]["choicess"] = ["a"]
    rows[4]["idx"] = 4
    rows[5] = {"mesages": rows[5]["messages"]}
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), on_bad_row="drop", max_drop_fraction=0.5)
    assert {line["line"]: (line["code"], line["why"]) for line in ledger(folder) if line["code"]} == {
        4: ("DATA-002", "has the unknown key 'choicess', did you mean 'choices'?"),
        6: (
            "DATA-026",
            "has no key 'messages', expected messages as in the rows before it, did you mean 'messages'?",
        ),
    }


def test_the_user_can_name_the_format_and_the_columns(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *({"question": f"q{i}", "reply": "a", "source": "x"} for i in range(9)))
    folder = prepare(tmp_path, base, path, columns={"question": "prompt", "reply": "completion"}, heldout_fraction=0.3)
    notes = json.loads((folder / "report.json").read_text())["notes"]
    assert notes == ["rows.jsonl: prompt_completion, by its keys", "columns without a meaning here: source"]
    with pytest.raises(DataError, match=r"DATA-026 rows\.jsonl:1 has no key 'text', expected text"):
        prepare(tmp_path, base, path, format="text")


def test_the_share_of_faulty_rows_that_is_proposed_is_enough(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", f"a{i}") for i in range(6)), {"messages": 1})
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, base, path)
    fraction = float(re.search(r"max_drop_fraction=(\S+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert fraction == 0.15
    prepare(tmp_path, base, path, on_bad_row="drop", max_drop_fraction=fraction, heldout_fraction=0.3)
