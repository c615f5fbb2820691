"""Copies, splits, mixtures and limits: decided over all rows, each with its reason in the ledger."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.output import dataset
from finetune.data.verdicts import earlier
from finetune.errors import DataError
from tests.test_data import jsonl, qa
from tests.test_shape import ledger, prepare

DRAW = random.Random(5)
WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "se", "to") for b in ("n", "r", "st", "l", "mp", "x")]


def words(count: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=count))


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_copies_are_found_whatever_case_and_punctuation_and_only_the_first_is_kept(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"question {i} {words(9)}", words(9)) for i in range(20)]
    loud = json.loads(json.dumps(rows[3]).upper().replace("MESSAGES", "messages"))
    loud = {
        "messages": [
            {"role": "user", "content": rows[3]["messages"][0]["content"].upper() + " !"},
            rows[3]["messages"][1],
        ]
    }
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows, loud, rows[5]))
    dropped = [(line["line"], line["code"], line["why"]) for line in ledger(folder) if line["verdict"] == "dropped"]
    assert dropped == [(21, "copy", "same words as rows.jsonl:4"), (22, "copy", "same words as rows.jsonl:6")]
    kept = prepare(tmp_path, base, tmp_path / "rows.jsonl", duplicates="report")
    assert report(kept)["kept"] == 22
    assert [line["resembles"] for line in ledger(kept) if "resembles" in line] == ["rows.jsonl:4", "rows.jsonl:6"]


def test_documents_are_never_split(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"q{i}", f"a{i}") | {"document": f"d{i % 7}"} for i in range(70)]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "r.jsonl", *rows), group_by="document", heldout_fraction=0.3)
    sides = [set(dataset(folder / f"{name}.arrow")["group"]) for name in ("train", "heldout")]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 2
    rows[9].pop("document")
    with pytest.raises(DataError, match=r"r\.jsonl:10 document is missing, expected str or number"):
        prepare(tmp_path, base, jsonl(tmp_path / "r.jsonl", *rows), group_by="document")


def test_the_newest_rows_are_held_out_and_their_groups_leave_the_past(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"q{i}", f"a{i}") | {"date": f"2026-{1 + i // 28:02d}-{1 + i % 28:02d}"} for i in range(100)]
    rows[0]["group"] = rows[99]["group"] = "old and new"
    DRAW.shuffle(rows)
    folder = prepare(tmp_path, base, jsonl(tmp_path / "r.jsonl", *rows), time_by="date", heldout_fraction=0.1)
    lines = {line["line"]: line for line in ledger(folder)}
    dates = {
        split: [rows[i - 1]["date"] for i in lines if lines[i]["split"] == split] for split in ("train", "heldout")
    }
    assert len(dates["heldout"]) == 10
    assert max(dates["train"]) < min(dates["heldout"])
    assert [line["code"] for line in lines.values() if line["code"]] == ["group-held-out"]


@pytest.mark.parametrize(
    "times",
    [
        [500 * i for i in range(1, 24)],
        [1990 + i for i in range(30)],
        [f"{1990 + i}" + "-07-01" * (i % 2) for i in range(30)],
        [*(1e15 * i for i in range(1, 10)), 1.001e16, 1.002e16, 2.5e16],
        [0.5 * i for i in range(-10, 10)],
        ["2024-01", "2024-01-02", "2024-01-02 07:00", *(f"2024-01-02T10:00:00.5-{i:02d}:00" for i in range(12))],
    ],
    ids=["counter", "years", "years and dates", "large numbers", "numbers below zero", "zones"],
)
def test_a_column_of_times_is_of_dates_or_of_numbers(tmp_path: Path, base: Path, times: list[Any]) -> None:
    rows = [qa(f"q{i}", "a", step=time) for i, time in enumerate(times)]
    DRAW.shuffle(rows)
    folder = prepare(tmp_path, base, jsonl(tmp_path / "r.jsonl", *rows), time_by="step", heldout_fraction=0.2)
    held = [rows[line["line"] - 1]["step"] for line in ledger(folder) if line["split"] == "heldout"]
    assert sorted(held, key=times.index) == times[-round(len(times) / 5) :]


def test_a_date_that_no_calendar_has_is_a_fault_of_its_row(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"q{i}", "a", date=f"2024-{1 + i % 12:02d}-01") for i in range(120)]
    rows[7]["date"] = "2024-13-45"
    path = jsonl(tmp_path / "r.jsonl", *rows)
    with pytest.raises(DataError, match=r"DATA-001 r\.jsonl:8 date is no date, expected YYYY-MM-DD or a number"):
        prepare(tmp_path, base, path, time_by="date")
    folder = prepare(tmp_path, base, path, time_by="date", on_bad_row="drop")
    assert [(line["line"], line["code"]) for line in ledger(folder) if line["code"]] == [(8, "DATA-001")]


def test_a_mixture_takes_its_shares_and_repeats_nothing(tmp_path: Path, base: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", *(qa(f"one {i}", "a") for i in range(90)))
    two = jsonl(tmp_path / "two.jsonl", *(qa(f"two {i}", "a") for i in range(300)))
    folder = prepare(tmp_path, base, one, two, mixture={str(one): 0.25, str(two): 0.75}, heldout_fraction=0.1)
    train = Counter(name.partition("#")[0] for name in dataset(folder / "train.arrow")["row"])
    assert train["two.jsonl"] == pytest.approx(3 * train["one.jsonl"], abs=2)
    assert report(folder)["dropped"]["mixture"] == 390 - report(folder)["kept"]


def test_a_mixture_tells_files_of_one_name_apart(tmp_path: Path, base: Path) -> None:
    for folder, count in (("a", 90), ("b", 90)):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "train.jsonl", *(qa(f"{folder} {i}", "a") for i in range(count)))
    one, two = tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl"
    folders = [
        prepare(tmp_path, base, one, two, mixture={str(one): share, str(two): 1 - share}) for share in (0.9, 0.1, 0.5)
    ]
    assert len(set(folders)) == 3, "each has its address"
    for folder, share in zip(folders, (0.9, 0.1, 0.5), strict=True):
        train = Counter(name.partition("/")[0] for name in dataset(folder / "train.arrow")["row"])
        assert train["a"] / train.total() == pytest.approx(share, abs=0.02)
        assert train.total() > 80


def test_a_mixture_in_which_a_share_has_no_rows_or_two_have_the_same_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rows").mkdir()
    one = jsonl(tmp_path / "rows" / "one.jsonl", *(qa(f"one {i}", "a") for i in range(30)))
    two = jsonl(tmp_path / "rows" / "two.jsonl", *(qa(f"one {i}", "a") for i in range(30)))
    with pytest.raises(DataError, match=r"DATA-031 data\.mixture: \S*two\.jsonl has no training row.*Try: rows for it"):
        prepare(tmp_path, base, one, two, mixture={str(one): 0.5, str(two): 0.5})
    jsonl(two, *(qa(f"two {i}", "a") for i in range(30)))
    with pytest.raises(DataError, match=r"DATA-031 data\.mixture: \S*one\.jsonl and \S* both have one\.jsonl"):
        prepare(tmp_path, base, one.parent, one, mixture={str(one.parent): 0.5, str(one): 0.5})


def test_a_row_is_cut_only_if_so_wished_and_must_keep_something_to_learn(tmp_path: Path, base: Path) -> None:
    rows = [qa("q", "a" * n) for n in (5, 50, 500)] + [qa(f"{i}", "a") for i in range(17)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    folder = prepare(tmp_path, base, path, too_long="cut", max_length=64)
    lines = {line["line"]: line for line in ledger(folder)}
    assert [lines[i]["truncated"] for i in (1, 2, 3, 4)] == [False, True, True, False]
    assert report(folder)["truncated"] == 2
    assert lines[3]["tokens"] == 64
    rows.append(qa("q" * 100, "a"))
    with pytest.raises(
        DataError, match=r"MASK-001 1 of 21 rows .*rows\.jsonl:21.*Try: data\.max_length=(\d+)"
    ) as caught:
        prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), too_long="cut", max_length=64)
    need = int(caught.value.fix.removeprefix("data.max_length=").partition(",")[0])
    prepare(tmp_path, base, tmp_path / "rows.jsonl", too_long="cut", max_length=need)
    with pytest.raises(DataError, match="MASK-001"):
        prepare(tmp_path, base, tmp_path / "rows.jsonl", too_long="cut", max_length=need - 1)


def test_long_rows_are_dropped_if_so_wished(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"{i}", "a" * (1 + 10 * i)) for i in range(12)))
    folder = prepare(tmp_path, base, path, too_long="drop", max_length=100)
    lines = ledger(folder)
    long = [line for line in lines if line["code"] == "long"]
    assert long == [line for line in lines if line["tokens"] > 100]
    assert [line["line"] for line in long] == [9, 10, 11, 12]
    assert all(line["why"].endswith("data.max_length=100") for line in long)


def test_plain_text_is_split_into_pieces_and_nothing_is_lost(tmp_path: Path, base: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(words(60 + i))
    folder = prepare(tmp_path, base, tmp_path / "texts", max_length=64)
    lines, found = ledger(folder), report(folder)
    assert found["rows_read"] == found["kept"] == len(lines) > 12
    assert {line["file"] for line in lines} == {f"{i}.txt" for i in range(12)}
    assert sum(split["tokens"] for split in found["splits"].values()) == sum(line["tokens"] for line in lines)
    assert found["splits"]["train"]["longest"] == 64
    assert found["splits"]["train"]["rows"] > len(lines)


def test_short_and_foreign_rows_are_dropped_with_a_line(tmp_path: Path, base: Path) -> None:
    english = "The court held that the tenant must pay the rent for the whole of the year under the contract."
    german = "Das Gericht entschied, dass der Mieter die Miete für das ganze Jahr nach dem Vertrag zahlen muss."
    rows = [qa(f"{i}: {english}", english) for i in range(9)] + [qa(german, german), qa("Yes?", "No.")]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "r.jsonl", *rows), min_words=5, languages=["en"])
    assert {line["line"]: line["code"] for line in ledger(folder) if line["code"]} == {10: "language", 11: "short"}


@pytest.mark.parametrize("policy", ["report", "redact", "drop"])
def test_personal_data_is_reported_redacted_or_its_row_dropped(tmp_path: Path, base: Path, policy: str) -> None:
    rows = [qa(f"question {i}", "answer") for i in range(20)]
    rows[4] = qa("My address is jane.roe@example.org, my card 4111 1111 1111 1111.", "Thank you, jane.roe@example.org.")
    reply = "Ask jane.roe@example.org"
    rows[7] = qa("Whom?", reply, choices=[reply, "Nobody"])
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), privacy=policy)
    line = ledger(folder)[4]
    assert line["verdict"] == ("dropped" if policy == "drop" else "kept")
    assert Counter(line["privacy"].split(",")) == {"email": 2, "card": 1}
    assert report(folder)["found"] == {"card": 1, "email": 3}
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert (b"jane.roe" in written) == (policy == "report")
    assert (b"[EMAIL]" in written) == (policy == "redact")


def test_quality_flags_are_counted_or_drop_the_row(tmp_path: Path, base: Path) -> None:
    rows = [qa(f"question {i}", "A whole answer.") for i in range(20)]
    rows[6] = qa("question", "the same words again " * 40)
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    assert ledger(prepare(tmp_path, base, path, quality="report"))[6]["flags"].startswith("repetition")
    assert ledger(prepare(tmp_path, base, path, quality="drop"))[6]["code"] == "quality"


@pytest.mark.parametrize("policy", ["fail", "drop", "report"])
def test_items_of_an_evaluation_set_are_found_in_training_rows(tmp_path: Path, base: Path, policy: str) -> None:
    from finetune.data.contamination import build
    from finetune.data.items import read_items

    items = [{"id": f"item-{i}", "question": words(16), "answer": words(3)} for i in range(30)]
    build(read_items(jsonl(tmp_path / "items.jsonl", *items)), "exam", "text").save(tmp_path / "exam.index")
    rows = [qa(words(30), words(10)) for _ in range(40)]
    rows[11] = qa(f"Please: {items[3]['question'].upper()}!", "yes")
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    settings = {"benchmarks": {str(tmp_path / "exam.index"): policy}, "heldout_fraction": 0.05}
    if policy == "fail":
        with pytest.raises(DataError, match=r"DATA-014 (.|\n)*rows\.jsonl:12 it contains item item-3") as caught:
            prepare(tmp_path, base, path, **settings)
        assert caught.value.fix == "remove these rows, or data.benchmarks={INDEX: drop}"
        return
    folder = prepare(tmp_path, base, path, **settings)
    line = ledger(folder)[11]
    if line["split"] == "heldout":
        pytest.skip("the planted row was held out")
    assert line["code"] == ("benchmark" if policy == "drop" else "")
    assert json.loads(line["benchmarks"])[0][:2] == ["exam", "item-3"]
    assert any("paraphras" in limit for limit in report(folder)["not_detected"])


def test_two_indexes_of_one_name_are_refused(tmp_path: Path, base: Path) -> None:
    from finetune.data.contamination import build
    from finetune.data.items import Item

    for name in ("one", "two"):
        build([Item(id="i", text=words(16))], "exam", "text").save(tmp_path / f"{name}.index")
    path = jsonl(tmp_path / "rows.jsonl", *(qa(words(9), words(9)) for _ in range(20)))
    policies = {str(tmp_path / "one.index"): "fail", str(tmp_path / "two.index"): "report"}
    with pytest.raises(DataError, match=r"DATA-020 two indexes of data\.benchmarks are called exam"):
        prepare(tmp_path, base, path, benchmarks=policies)


@pytest.mark.parametrize("different", [1, 2, 5, 1000])
def test_equal_entries_are_told_in_turn_with_the_first_of_each(different: int) -> None:
    keys = np.random.default_rng(different).integers(0, different, 300).astype(np.uint64)
    firsts: dict[int, int] = {}
    told = [(row, firsts[key]) for row, key in enumerate(keys.tolist()) if firsts.setdefault(key, row) != row]
    late, first = earlier(keys)
    assert list(zip(late.tolist(), first.tolist(), strict=True)) == told
    assert [len(found) for found in earlier(keys[:0])] == [0, 0]
