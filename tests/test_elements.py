"""A JSON array read element by element: the same elements as json.loads, bounded memory, and faults named."""

import io
import json
import random
import tracemalloc

import pytest

from finetune.data import elements as module
from finetune.data.elements import elements
from finetune.data.files import blocks, sources
from finetune.data.records import records


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
        found = [json.loads(element) for element in elements(Few(f" \n{text}\r\n ", size), 10**6)]
        assert found == values


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
        list(elements(Few(text, size), 10**6))


def test_an_element_beyond_the_limit_is_refused_before_more_of_it_is_read() -> None:
    stream = Few('[{"a": "' + "x" * 5000 + '"}]', 100)
    with pytest.raises(ValueError, match="element 1 has more than 1,000 characters"):
        list(elements(stream, 1000))
    assert stream.tell() < 1500


def test_a_fault_in_the_middle_is_found_without_reading_the_rest() -> None:
    stream = Few('[{"a": 1}, {"a": b}, ' + '{"a": 1}, ' * 10_000 + "1]", 100)
    with pytest.raises(ValueError, match="element 2 cannot be read"):
        list(elements(stream, 10**6))
    assert stream.tell() < 300


def test_memory_does_not_grow_with_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10_000)
    peaks = []
    for count in (2_000, 40_000):
        stream = io.StringIO("[" + ",".join(['{"a": "' + "x" * 100 + '"}'] * count) + "]")
        tracemalloc.start()
        assert sum(1 for _ in elements(stream, 10**6)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_rows_of_an_array_are_looked_at_as_lines_are(tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 1, "a": 2},\n {"a": NaN}, {"a": "ends"}]', encoding="utf-8-sig")
    found = [r for block in blocks(sources([str(path)])[0]) for r in records(block)]
    assert [(r.line, r.value) for r in found] == [(1, {"a": 1}), (2, None), (3, None), (4, {"a": "ends"})]
    assert [r.faults for r in found] == [
        (),
        ("DATA-023 @ has the key 'a' twice in one object",),
        ("DATA-022 @ has NaN, which is not JSON",),
        (),
    ]
