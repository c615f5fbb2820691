"""A JSON array read element by element: the same elements as json.loads, bounded memory, and faults named."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from finetune.data import elements as module
from finetune.data.elements import Elements
from finetune.data.files import blocks, sources
from finetune.data.records import records
from finetune.errors import DataError
from tests.test_data import qa
from tests.test_shape import ledger, prepare


class Few(io.StringIO):
    """Gives few characters at a time, so that every boundary falls inside something."""

    def __init__(self, text: str, size: int) -> None:
        super().__init__(text)
        self.few = size

    def read(self, size: int | None = -1, /) -> str:
        return super().read(self.few)


def some_value(draw: random.Random, depth: int = 0) -> object:
    kinds = ["text", "number", "literal", *(["list", "object"] if depth < 3 else [])]
    match draw.choice(kinds):
        case "text":
            return "".join(draw.choice('ab"\\/,[]{}:\n\u2028é😀') for _ in range(draw.randrange(8)))
        case "number":
            return draw.choice([0, -1, 10**20, 1.5e-7, -2.25, 123456])
        case "literal":
            return draw.choice([True, False, None, float("-inf"), {}, []])
        case "list":
            return [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
        case _:
            return {f"k{i}": some_value(draw, depth + 1) for i in range(draw.randrange(4))}


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_they_are_the_elements_that_json_finds_wherever_the_pieces_end(size: int) -> None:
    draw = random.Random(size)
    for _ in range(40):
        values = [some_value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(values, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        found = [json.loads(element) for element in Elements(Few(f" \n{text}\r\n ", size), 10**6)]
        assert found == values


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_each_is_given_with_the_line_in_which_it_begins(size: int) -> None:
    draw = random.Random(size)
    for _ in range(40):
        text, lines = draw.choice(["[", "\r\n\n[", " [\n"]), []
        for i in range(draw.randrange(1, 6)):
            text += "," * (i > 0) + draw.choice(["", " ", "\n", "\r\n \n"])
            lines.append(text.count("\n") + 1)
            text += json.dumps(some_value(draw), indent=draw.choice([None, 2])) + draw.choice(["", "\n\n"])
        found = Elements(Few(text + "]\n\n", size), 10**6)
        assert [found.line for _ in found] == lines
        broken = Elements(Few(text + ",\n\n\n  oops]", size), 10**6)
        with pytest.raises(ValueError, match="cannot be read"):
            list(broken)
        assert broken.line == text.count("\n") + 4


@pytest.mark.parametrize("size", [1, 3, 4096])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it begins with ''"),
        ("5", "it begins with '5'"),
        ("[", "element 1 cannot be read: Expecting value"),
        ("[1, 2", "element 2 cannot be read: the file ends inside the list"),
        ('[{"a": 1}', "element 1 cannot be read: the file ends inside the list"),
        ('[{"a": 1}, {"a": "long', "element 2 cannot be read: Unterminated string"),
        ("[1 2]", "element 1 cannot be read: it is followed by '2', expected a comma"),
        ("[1,]", "element 2 cannot be read: Expecting value"),
        ("[,1]", "element 1 cannot be read: Expecting value"),
        ("[1]]", "characters, .*follows the list"),
        ("[1]  \n[2]", "characters, .*follows the list"),
        ('[{"a" 1}' + " " * 40 + "]", "element 1 cannot be read: Expecting ':' delimiter"),
    ],
)
def test_what_is_no_array_is_named_with_the_element(text: str, told: str, size: int) -> None:
    with pytest.raises(ValueError, match=told):
        list(Elements(Few(text, size), 10**6))


def test_an_element_beyond_the_limit_is_refused_before_more_of_it_is_read() -> None:
    stream = Few('[{"a": "' + "x" * 5000 + '"}]', 100)
    with pytest.raises(ValueError, match="element 1 has more than 1,000 characters"):
        list(Elements(stream, 1000))
    assert stream.tell() < 1500


def test_a_fault_in_the_middle_is_found_without_reading_the_rest() -> None:
    stream = Few('[{"a": 1}, {"a": b}, ' + '{"a": 1}, ' * 10_000 + "1]", 100)
    with pytest.raises(ValueError, match="element 2 cannot be read"):
        list(Elements(stream, 10**6))
    assert stream.tell() < 300


def test_memory_does_not_grow_with_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10_000)
    peaks = []
    for count in (2_000, 40_000):
        stream = io.StringIO("[" + ",".join(['{"a": "' + "x" * 100 + '"}'] * count) + "]")
        tracemalloc.start()
        assert sum(1 for _ in Elements(stream, 10**6)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_rows_of_an_array_are_looked_at_as_lines_are(tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 1, "a": 2},\n {"a": NaN}, {"a": "ends"}]', encoding="utf-8-sig")
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert [(r.place, r.value) for r in found] == [("1", {"a": 1}), ("1:2", None), ("2", None), ("2:4", {"a": "ends"})]
    assert [r.faults for r in found] == [
        (),
        ("DATA-023 @ has the key 'a' twice in one object",),
        ("DATA-022 @ has NaN, which is not JSON",),
        (),
    ]


def test_rows_of_an_array_are_named_by_their_line_in_faults_and_ledger(tmp_path: Path, base: Path) -> None:
    rows = [json.dumps(qa(f"question {i}", f"answer {i}"), indent=2) for i in range(12)]
    short = ", ".join(json.dumps(qa(f"short {i}", "a", id=f"id {i}")) for i in range(4))
    text = "[\n" + ",\n".join(rows) + ",\n" + short + ',\n{\n  "messages": "none"\n}, {"messages": 7}\n]'
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    per_row = rows[0].count("\n") + 1
    begins = [2 + per_row * i for i in range(12)] + [2 + per_row * 12] * 4 + [3 + per_row * 12, 5 + per_row * 12]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, base, tmp_path / "rows.json")
    told = caught.value.sentence()
    assert f"DATA-001 rows.json:{begins[16]} messages is str, expected list" in told
    assert f"DATA-001 rows.json:{begins[17]} messages is int, expected list" in told
    folder = prepare(tmp_path, base, tmp_path / "rows.json", on_bad_row="drop", max_drop_fraction=0.2)
    lines = ledger(folder)
    assert [line["line"] for line in lines] == begins
    assert [line["nth"] for line in lines if "nth" in line] == [14, 15, 16]
    assert [line["row"] for line in lines[11:14]] == [f"rows.json:{begins[11]}", "id 0", "id 1"]


def test_rows_of_an_array_on_one_line_are_told_apart_by_their_number(tmp_path: Path, base: Path) -> None:
    rows = [*(qa(f"question {i}", f"answer {i}") for i in range(12)), qa("Question 3?", "answer 3"), {"messages": 7}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"DATA-001 rows\.json:1:14 messages is int"):
        prepare(tmp_path, base, tmp_path / "rows.json")
    folder = prepare(tmp_path, base, tmp_path / "rows.json", on_bad_row="drop", max_drop_fraction=0.2)
    lines = ledger(folder)
    assert [line["row"] for line in lines] == ["rows.json:1", *(f"rows.json:1:{n}" for n in range(2, 15))]
    assert [(line["code"], line["why"]) for line in lines if line["code"] == "copy"] == [
        ("copy", "same words as rows.json:1:4")
    ]
