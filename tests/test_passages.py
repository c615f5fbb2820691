"""Plain text of any size becomes passages that end where paragraphs do, each with its line, and some are held out."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from finetune.data import files
from finetune.data.files import blocks, sources
from finetune.data.output import dataset
from finetune.data.passages import Passages
from finetune.data.records import records
from finetune.errors import DataError
from tests.test_data import CHATML, make_tokenizer
from tests.test_elements import Few
from tests.test_shape import ledger, prepare

WORDS = ("sea", "mountain", "of", "a", "harbour", "in", "winter", "went", "lights", "and", "over", "the", "slowly")


def book(count: int, seed: int = 1, end: str = "\n\n") -> str:
    """Paragraphs of one or two lines, all different."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randrange(5, 30))) for _ in range(count)]
    lines = [f"{i} {text}".replace(" the ", draw.choice((" the ", "\n")), 1) + "." for i, text in enumerate(made)]
    return end.join(lines) + "\n"


def passages(text: str, size: int, few: int = 4096) -> list[tuple[int, str, bool]]:
    found = Passages(Few(text, few), size)
    return [(found.line, *json.loads(raw)) for raw in found]


@pytest.mark.parametrize("few", [1, 7, 4096])
@pytest.mark.parametrize("end", ["\n\n", "\n \n\n\n    ", "\r\n\r\n", "\n", " "])
def test_passages_put_together_are_the_text_and_each_has_its_line(few: int, end: str) -> None:
    for seed, size in ((1, 100), (2, 257), (3, 5000)):
        text = "\n\n" * seed + book(40, seed, end) + "\n\n\n"
        found, at = passages(text, size, few), 0
        assert len(found) >= len(text.strip()) / size
        for line, passage, goes_on in found:
            begin = text.index(passage, at)
            assert not text[at:begin].strip()
            assert passage.strip() and len(passage) <= size
            assert line == text[: begin + len(passage) - len(passage.lstrip())].count("\n") + 1
            assert goes_on == (passage is not found[-1][1])
            at = begin + len(passage)
        assert not text[at:].strip()


def test_a_passage_ends_at_a_paragraph_else_a_line_else_a_sentence_else_a_word() -> None:
    a, b = "a" * 60, "b" * 25
    for mark in ("\n\n", "\r\n\r\n", "\n", ". ", "\u3002", " "):
        weaker = " " * (mark != " ")
        assert passages(f"{a}{mark}{b}{weaker}{b}", 100)[0][1] == a + mark
    assert [passage for _, passage, _ in passages("c" * 250, 100)] == ["c" * 100, "c" * 100, "c" * 50]
    assert [passage for _, passage, _ in passages(f"c\n\n{'d' * 120}", 100)] == [f"c\n\n{'d' * 97}", "d" * 23]


def test_a_text_of_blank_lines_alone_is_one_row_and_its_fault(tmp_path: Path, base: Path) -> None:
    (tmp_path / "some.txt").write_text(book(60))
    (tmp_path / "void.txt").write_text("\n" * 50_000)
    with pytest.raises(DataError, match=r"(?s)1 of \d+ rows have faults.*DATA-003 void\.txt:1 text is empty"):
        prepare(tmp_path, base, tmp_path, max_length=64)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 50_000)
    peaks = []
    for name, end in (("lines.txt", "\n"), ("paragraphs.txt", "\n\n"), ("one_line.txt", " ")):
        for count in (1_000, 40_000):
            path = tmp_path / name
            path.write_text(book(count, end=end).replace("\n", end))
            (source,) = sources([str(path)])
            tracemalloc.start()
            rows = sum(len(block.lines) for block in blocks(source, 1000))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert rows >= path.stat().st_size / 1000
        assert peaks[-1] < 1.2 * peaks[-2], name
    assert max(peaks) < 1_000_000


def test_one_book_gives_both_splits_with_each_passage_named_by_its_line(tmp_path: Path, base: Path) -> None:
    path, text = tmp_path / "book.txt", book(400)
    path.write_text(text)
    folder = prepare(tmp_path, base, path, max_length=256)
    rows = ledger(folder)
    assert [line["line"] for line in rows] == [line for line, _, _ in passages(text, 1024)]
    assert {line["verdict"] for line in rows} == {"kept"}
    assert [line["row"] for line in rows] == [f"book.txt:{line['line']}" for line in rows]
    held = [i for i, line in enumerate(rows) if line["split"] == "heldout"]
    assert len(held) == round(0.1 * len(rows)) >= 3
    assert (
        set(dataset(folder / "heldout.arrow")["group"]) == set(dataset(folder / "train.arrow")["group"]) == {path.name}
    )
    (told,) = (note for note in json.loads((folder / "report.json").read_text())["notes"] if "too long" in note)
    assert told.startswith("too long to be held out whole: book.txt; stretches of 1 passages are held out")


def test_the_end_of_a_text_is_trained_once_behind_its_last_passage(tmp_path: Path, base: Path) -> None:
    path, text = tmp_path / "book.txt", book(100)
    path.write_text(text)
    folder = prepare(tmp_path, base, path, max_length=64)
    tokenizer = make_tokenizer(CHATML)
    ids = {row["row"]: row["input_ids"] for name in ("train", "heldout") for row in dataset(folder / f"{name}.arrow")}
    assert len(ids) > 100
    lines = [line for line, _, _ in passages(text, 256)]
    assert len(lines) > 20
    ends = sorted(row for row, tokens in ids.items() if tokenizer.eos_token_id in tokens)
    assert [row.partition("#")[0] for row in ends] == [f"book.txt:{lines[-1]}"]
    whole: dict[int, list[int]] = {place: [] for place in lines}
    for row, tokens in sorted(ids.items(), key=lambda item: int(f"0{item[0].partition('#')[2]}")):
        whole[int(row.partition("#")[0].rpartition(":")[2])] += tokens
    assert tokenizer.decode([token for tokens in whole.values() for token in tokens]) == text + "<|im_end|>"


def test_neighbours_are_held_out_together_where_there_are_many(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book(5000))
    rows = ledger(prepare(tmp_path, base, path, max_length=128, heldout_fraction=0.2))
    held = [i for i, line in enumerate(rows) if line["split"] == "heldout"]
    length = round(0.2 * len(rows)) // 8
    runs = "".join("h" if i in set(held) else " " for i in range(len(rows))).split()
    assert 0.15 * len(rows) < len(held) <= 0.2 * len(rows)
    assert length >= 5 and 4 <= len(runs) <= 9
    assert all(len(run) % length == 0 or i == len(runs) - 1 for i, run in enumerate(runs))


def test_texts_that_are_short_enough_are_held_out_whole(tmp_path: Path, base: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(book(30, seed=i))
    folder = prepare(tmp_path, base, tmp_path, max_length=64)
    sides: dict[str, set[str]] = {}
    for line in ledger(folder):
        sides.setdefault(line["file"], set()).add(line["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {"heldout"} for side in sides.values()) in (1, 2)
    assert not any("too long" in note for note in json.loads((folder / "report.json").read_text())["notes"])


def test_bytes_that_are_no_text_are_a_fault_there_and_what_came_before_is_kept(tmp_path: Path, base: Path) -> None:
    path, text = tmp_path / "book.txt", book(400)
    path.write_bytes(text.encode() + b"\xe9t\xe9 " + book(100).encode())
    with pytest.raises(DataError, match=r"DATA-006 book\.txt:\d+ cannot be read, nor anything behind it: .*utf-8"):
        prepare(tmp_path, base, path, max_length=256)
    *kept, last = ledger(tmp_path / "rejected")
    assert last["code"] == "DATA-006"
    assert [line["line"] for line in (*kept, last)] == [line for line, _, _ in passages(text, 1024)][: len(kept) + 1]
    assert {line["verdict"] for line in kept} == {"kept"}
    assert len(kept) >= 8


def test_a_text_without_lines_is_cut_between_words_and_its_rows_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text(" ".join(WORDS) * 50)
    found = [record for block in blocks(sources([str(path)])[0], 500) for record in records(block)]
    assert [record.place for record in found] == ["1", *(f"1:{n}" for n in range(2, len(found) + 1))]
    assert len(found) > 5
