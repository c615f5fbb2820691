"""What is looked at in the words of a row is looked at in all of them, wherever they stand and however they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.tokens import load_tokenizer
from tests.test_data import jsonl
from tests.test_shape import ledger, prepare
from tests.test_verdicts import report, words


def ready(base: Path, question: str, answer: str) -> dict[str, Any]:
    """A row that comes as tokens."""
    tokenizer = load_tokenizer(base)
    asked, told = (tokenizer(text)["input_ids"] for text in (f"<|im_start|>{question}", f"{answer}<|im_end|>"))
    return {"input_ids": asked + told, "labels": [-100] * len(asked) + told}


def test_rows_that_come_as_tokens_are_looked_at_like_others(tmp_path: Path, base: Path) -> None:
    rows = [ready(base, f"question {i} {words(9)}", words(9)) for i in range(20)]
    rows[3] = ready(base, "My address is jane.roe@example.org.", "Thank you.")
    rows[5] = ready(base, "question", "the same words again " * 40)
    long = words(60)
    rows[7], rows[8] = ready(base, long, "yes it is"), ready(base, long, "yes it was")
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    folder = prepare(tmp_path, base, path, privacy="report", quality="report", near_duplicates="report")
    lines = ledger(folder)
    assert {line["line"]: line["privacy"] for line in lines if "privacy" in line} == {4: "email"}
    assert lines[5]["flags"].startswith("repetition")
    assert [line["line"] for line in lines if "resembles" in line] == [9]
    assert lines[0]["trainable_tokens"] == len([label for label in rows[0]["labels"] if label != -100])
    for policy, why in (("drop", "it has email"), ("redact", "it has email, and tokens cannot be redacted")):
        line = ledger(prepare(tmp_path, base, path, privacy=policy, max_length=2048))[3]
        assert (line["code"], line["why"]) == ("privacy", why)


def test_an_item_of_an_evaluation_set_is_found_in_a_row_of_tokens(tmp_path: Path, base: Path) -> None:
    from finetune.data.contamination import build
    from finetune.data.items import Item

    item = words(16)
    build([Item("item-1", item)], "exam", "text").save(tmp_path / "exam.index")
    rows = [ready(base, f"question {i} {words(9)}", words(9)) for i in range(20)]
    rows[6] = ready(base, item, "So.")
    benchmarks = {str(tmp_path / "exam.index"): "drop"}
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), benchmarks=benchmarks)
    assert {line["line"]: line["code"] for line in ledger(folder) if line["code"]} == {7: "benchmark"}


def test_the_first_token_of_a_row_is_not_counted_as_trained(tmp_path: Path, base: Path) -> None:
    rows = [{"input_ids": [10 + i, 11, 12, 13], "labels": [10 + i, 11, -100, 13]} for i in range(12)]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), heldout_fraction=0.5)
    assert {line["trainable_tokens"] for line in ledger(folder)} == {2}
    assert sum(split["trainable_tokens"] for split in report(folder)["splits"].values()) == 2 * len(rows)
