"""Near copies and leaks across the split: what is found, what a template excuses, and what the ledger says of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DataError
from tests.test_data import conversation, jsonl, qa
from tests.test_shape import ledger, prepare
from tests.test_verdicts import report

DRAW = random.Random(6)
WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "se", "to") for b in ("n", "r", "st", "l", "mp", "x")]


def words(count: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=count))


def test_near_copies_are_reported_or_dropped(tmp_path: Path, base: Path) -> None:
    rows = [qa(words(40), words(40)) for _ in range(60)]
    near = [qa(row["messages"][0]["content"] + " indeed", row["messages"][1]["content"]) for row in rows[:10]]
    path = jsonl(tmp_path / "rows.jsonl", *rows, *near)
    counted = prepare(tmp_path, base, path, near_duplicates="report", heldout_fraction=0.02)
    assert any("are nearly earlier ones, e.g. rows.jsonl:6" in note for note in report(counted)["notes"])
    dropped = prepare(tmp_path, base, path, near_duplicates="drop", heldout_fraction=0.02)
    lines = [line for line in ledger(dropped) if line["code"] == "near-copy"]
    assert 9 <= len(lines) <= 10
    assert all(line["line"] > 60 or line["why"] for line in lines)
    assert lines[-1]["why"].startswith("nearly the same words as rows.jsonl:")


def test_rows_under_one_system_prompt_are_no_near_copies_for_it(tmp_path: Path, base: Path) -> None:
    system = {"role": "system", "content": words(33)}
    rows = [{"messages": [system, *qa(f"{words(6)} {i}", words(5))["messages"]]} for i in range(60)]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), near_duplicates="report")
    assert report(folder)["dropped"] == {}
    assert not any("nearly" in note for note in report(folder)["notes"])


@pytest.mark.parametrize("length", [12, 300])
@pytest.mark.parametrize("rows", [14, 50])
def test_rows_that_share_a_template_are_not_dropped_for_it(tmp_path: Path, base: Path, rows: int, length: int) -> None:
    template = f"Classify the sentiment of the following review as positive or negative. {words(length)}"
    path = jsonl(
        tmp_path / "rows.jsonl",
        *(qa(f"{template}: {words(2)} item {i}", ("positive", "negative")[i % 2]) for i in range(rows)),
    )
    folder = prepare(tmp_path, base, path, near_duplicates="report", near_share=0.6)
    assert report(folder)["dropped"] == {}
    assert any("counts as a template" in limit for limit in report(folder)["not_detected"])


def test_a_template_on_both_sides_of_the_users_own_files_is_no_leak(tmp_path: Path, base: Path) -> None:
    template = f"Classify the sentiment of the following review as positive or negative. {words(40)}"
    path = jsonl(tmp_path / "train.jsonl", *(qa(f"{template}: {words(2)} {i}", "positive") for i in range(60)))
    held = jsonl(tmp_path / "held.jsonl", *(qa(f"{template}: {words(2)} {i}", "positive") for i in range(60, 70)))
    folder = prepare(tmp_path, base, path, heldout_files=[str(held)], near_duplicates="report")
    assert report(folder)["dropped"] == {}


def test_where_near_copies_leave_no_row_the_error_says_so(tmp_path: Path, base: Path) -> None:
    template = words(200)
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"{template} {i}", "yes") for i in range(20)))
    said = r"DATA-009 no train row .*: dropped: \d+ near-copy.*: data\.near_duplicates=off, or data\.near_share above"
    with pytest.raises(DataError, match=said):
        prepare(tmp_path, base, path, near_duplicates="drop")


def test_a_copy_within_a_template_leaves_the_training_side(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"Read this contract and name its parties: {words(60)} {i}", words(9)) for i in range(100)]
    near = [qa(row["messages"][0]["content"] + " indeed", row["messages"][1]["content"]) for row in rows]
    path = jsonl(tmp_path / "rows.jsonl", *rows, *near)
    folder = prepare(tmp_path, base, path, near_duplicates="report")
    dropped = [line for line in ledger(folder) if line["code"] == "near-copy"]
    held = {line["line"] for line in ledger(folder) if line["split"] == "heldout"}
    pairs = {i for i in range(1, 101) if len(held & {i, i + 100}) == 1}
    assert len(dropped) >= 0.9 * len(pairs) > 9
    assert all((line["line"] + 99) % 100 + 1 in pairs for line in dropped)


def test_a_near_copy_between_the_users_own_files_is_a_leak(tmp_path: Path, base: Path) -> None:
    rows = [qa(words(40), words(40)) for _ in range(20)]
    train = jsonl(tmp_path / "train.jsonl", *rows)
    other = qa(rows[7]["messages"][0]["content"] + " indeed", rows[7]["messages"][1]["content"])
    held = jsonl(tmp_path / "held.jsonl", qa(words(40), "yes"), other)
    own = {"heldout_files": [str(held)], "near_duplicates": "report"}
    with pytest.raises(
        DataError, match=r"DATA-013 .*nearly held-out ones(.|\n)*train\.jsonl:8 is \d+% held-out held\.jsonl:2"
    ):
        prepare(tmp_path, base, train, **own)
    folder = prepare(tmp_path, base, train, **own, leakage="drop")
    assert [(line["line"], line["code"]) for line in ledger(folder) if line["code"]] == [(8, "near-copy")]


def test_a_question_on_both_sides_is_dropped_only_if_so_wished(tmp_path: Path, base: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", qa("one?", "1"), qa("two?", "2"))
    held = jsonl(tmp_path / "held.jsonl", qa("three?", "3"), qa("Two? ", "zwei"))
    with pytest.raises(DataError, match=r"DATA-013 (.|\n)*held\.jsonl:2 asks what train\.jsonl:2 trains on"):
        prepare(tmp_path, base, train, heldout_files=[str(held)])
    folder = prepare(tmp_path, base, train, heldout_files=[str(held)], leakage="drop")
    lines = {(line["file"], line["line"]): line for line in ledger(folder)}
    assert lines["train.jsonl", 2]["code"] == "leak"
    assert lines["train.jsonl", 2]["why"] == "asks what is held out in held.jsonl:2"


def talk(*texts: str, system: str = "") -> dict[str, Any]:
    opening = [{"role": "system", "content": system}] if system else []
    return {"messages": [*opening, *conversation(*texts)]}


HIDDEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("other punctuation", talk("Who pays the rent?", "B"), talk("Who  pays the “rent”", "A")),
    ("full-width punctuation", talk("\u8c01\u4ed8\uff1f", "B"), talk("\u8c01\u4ed8", "A")),
    ("a system message in training only", talk("Who pays?", "B"), talk("Who pays?", "A", system="Be short.")),
    ("a system message held out only", talk("Who pays?", "B", system="Be short."), talk("Who pays?", "A")),
    ("the first turn of a conversation", talk("Who pays?", "B"), talk("Who pays?", "B", "When?", "Now.")),
    ("a later turn", talk("Hi.", "Yes?", "Who pays?", "B"), talk("Hi", "Yes.", "Who pays?", "A", "When?", "Now.")),
    ("no words at all", talk("?!", "B"), talk("?!", "A")),
]
"""How -> a held-out row, and a training row that teaches what it asks."""

UNLIKE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("another sign", talk("7 + 3", "10"), talk("7 - 3", "4")),
    ("another number", talk("1.5 kg?", "10"), talk("15 kg?", "4")),
    ("no words", talk("?!", "B"), talk("...", "A")),
    ("another task", talk("rent", "Miete", system="In German."), talk("rent", "loyer", system="In French.")),
    ("the last turn after another", talk("When?", "Now."), talk("Who pays?", "A", "When?", "Now.")),
]
"""The same for a training row that is another question."""


@pytest.mark.parametrize(("held", "train"), [case[1:] for case in HIDDEN], ids=[case[0] for case in HIDDEN])
def test_a_held_out_question_is_found_in_training_whatever_stands_around_it(
    tmp_path: Path, base: Path, held: dict[str, Any], train: dict[str, Any]
) -> None:
    path = jsonl(tmp_path / "train.jsonl", qa("another", "1"), train, qa("and one more", "2"))
    other = jsonl(tmp_path / "held.jsonl", qa("something else", "1"), held)
    with pytest.raises(
        DataError, match=r"DATA-013 1 training rows (.|\n)*held\.jsonl:2 asks what train\.jsonl:2 trains"
    ):
        prepare(tmp_path, base, path, heldout_files=[str(other)])
    folder = prepare(tmp_path, base, path, heldout_files=[str(other)], leakage="drop")
    assert [(line["line"], line["code"]) for line in ledger(folder) if line["code"]] == [(2, "leak")]
    assert any(limit.startswith("leaks: ") for limit in report(folder)["not_detected"])


@pytest.mark.parametrize(("held", "train"), [case[1:] for case in UNLIKE], ids=[case[0] for case in UNLIKE])
def test_another_question_is_no_leak(tmp_path: Path, base: Path, held: dict[str, Any], train: dict[str, Any]) -> None:
    path, other = jsonl(tmp_path / "train.jsonl", train), jsonl(tmp_path / "held.jsonl", held)
    assert report(prepare(tmp_path, base, path, heldout_files=[str(other)]))["kept"] == 2


def test_a_turn_that_is_not_trained_leaks_nothing(tmp_path: Path, base: Path) -> None:
    row = talk("Who pays?", "B", "When?", "Now.")
    other = jsonl(tmp_path / "held.jsonl", qa("Who pays?", "B"))
    path = jsonl(tmp_path / "train.jsonl", row)
    prepare(tmp_path, base, path, heldout_files=[str(other)], turns="last")
    row["messages"][1]["weight"] = 0
    prepare(tmp_path, base, jsonl(path, row), heldout_files=[str(other)])


def test_a_conversation_that_goes_on_from_a_held_out_row_is_dropped_where_the_split_is_ours(
    tmp_path: Path, base: Path
) -> None:
    rows = [talk(f"Who pays {i}?", "B") for i in range(50)]
    rows += [talk(f"Who pays {i}?", "B", "When?", f"In {i} days.") for i in range(50)]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), heldout_fraction=0.2)
    lines = {line["line"]: line for line in ledger(folder)}
    short = {i for i in range(1, 51) if lines[i]["split"] == "heldout"}
    leaks = {i for i in lines if lines[i]["code"] == "leak"}
    assert leaks == {i + 50 for i in short if lines[i + 50]["split"] != "heldout"} and len(leaks) > 3
    assert (
        f"{len(leaks)} training rows ask what is held out, and are dropped: the split put them there"
        in report(folder)["notes"]
    )


@pytest.mark.parametrize("kind", ["the question", "nearly the row"])
def test_the_rejected_ledger_has_an_error_for_every_leaking_row(tmp_path: Path, base: Path, kind: str) -> None:
    rows = [qa(words(40), words(40)) for _ in range(40)]
    path = jsonl(tmp_path / "train.jsonl", *rows)
    more = "?" if kind == "the question" else " indeed"
    leaks = [qa(row["messages"][0]["content"] + more, row["messages"][1]["content"] + more) for row in rows[5:30]]
    held = jsonl(tmp_path / "held.jsonl", *leaks, qa("another", "row"))
    near = "off" if kind == "the question" else "report"
    with pytest.raises(DataError, match=r"DATA-013 25 (.|\n)*and 5 more(.|\n)*ledger\.jsonl names every row"):
        prepare(tmp_path, base, path, heldout_files=[str(held)], near_duplicates=near)
    lines = [line for line in ledger(tmp_path / "rejected") if line["verdict"] == "error"]
    assert [(line["file"], line["line"], line["code"]) for line in lines] == [
        ("train.jsonl", i, "DATA-013") for i in range(6, 31)
    ]
    assert [line["why"] for line in lines] == [f"trains on what is held out in held.jsonl:{i}" for i in range(1, 26)]
