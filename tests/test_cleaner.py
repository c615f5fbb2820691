"""What is looked at in the words of a row is looked at in all of them, wherever they stand and however they came."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from finetune.data.cleaner import Cleaner
from finetune.data.rows import Row
from finetune.data.shape import conversation
from finetune.data.tokens import load_tokenizer
from finetune.recipe import Data
from tests.test_data import jsonl
from tests.test_shape import ledger, prepare
from tests.test_verdicts import report, words

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
MAIL = "jane.roe@example.org"


def with_a_secret(place: str) -> dict[str, Any]:
    """A row with an address somewhere beside its words."""
    schema: dict[str, Any] = {"type": "object", "properties": {"at": {"type": "integer"}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "There."},
    ]
    tool = {"name": "look", "description": "looks", "parameters": schema}
    if place == "description of a tool":
        tool["description"] = f"asks {MAIL}"
    elif place == "schema of a tool":
        schema["properties"]["at"]["enum"] = [MAIL]
    elif place == "name in a schema":
        schema["properties"][MAIL] = {"type": "string"}
    elif place == "name of who speaks":
        turns[0]["name"] = MAIL
    else:
        turns[1]["tool_calls"] = [{**CALL, "function": {"name": "look", "arguments": {MAIL: 1}}}]
    return {"messages": turns, "tools": [{"type": "function", "function": tool}]}


@pytest.mark.parametrize("policy", ["report", "redact", "drop"])
@pytest.mark.parametrize(
    "place", ["description of a tool", "schema of a tool", "name in a schema", "name of who speaks", "argument"]
)
def test_an_address_is_found_wherever_a_template_may_write_it(place: str, policy: Any) -> None:
    row = Row(file="f", line=1, id="f:1", sha256="")
    assert conversation(row, with_a_secret(place), "messages") == []
    fact: dict[str, Any] = {}
    Cleaner(Data(privacy=policy)).clean(row, fact)
    assert fact["privacy"] == "email"
    assert row.code == ("privacy" if policy == "drop" else "")
    assert (MAIL in json.dumps(asdict(row))) == (policy != "redact")
    assert ("[EMAIL]" in json.dumps(asdict(row))) == (policy == "redact")


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
