"""One block of records becomes one part: what of a row stands in its facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.part import said
from tests.test_data import jsonl, qa
from tests.test_shape import TOOL, ledger, prepare


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("4*1", "4/1"),
        ("a<b", "a>b"),
        ("a != b", "a = b"),
        ("x + -5", "x + 5"),
        ("7 %", "7 &"),
        ("\U0001f44d", "\U0001f44e"),
        ("5 €", "5 £"),
        ("\u0930\u093e\u092e \u0915\u0940", "\u0930\u093e\u092e \u0915\u093e"),
        ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),
        ("x**2", "x*2"),
        ("a\\b", "a/b"),
        ("\u2212 3", "3"),
    ],
)
def test_signs_emoji_and_vowel_marks_tell_texts_apart(one: str, other: str) -> None:
    assert said(one) != said(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Well-known: yes!", "well known; YES"),
        ("\u201cSo\u201d (he said) \u2026", '"so", he said...'),
        ("4*1", "4 *  1"),
        ("\u00e9cole", "e\u0301cole"),
        ("\u597d\u3002", "\u597d\uff01"),
        ("\u0930\u093e\u092e\u0964", "\u0930\u093e\u092e"),
        ("soft\u200b", "soft"),
    ],
)
def test_case_spacing_and_ordinary_punctuation_do_not(one: str, other: str) -> None:
    assert said(one) == said(other)


def test_rows_that_differ_by_a_sign_or_by_their_tools_are_no_copies(tmp_path: Path, base: Path) -> None:
    rows: list[dict[str, Any]] = [qa("What is 4*1?", "4"), qa("What is 4/1?", "4"), qa("what is 4 / 1", "4!")]
    more = json.loads(json.dumps(TOOL))
    more["function"]["description"] = "looks"
    rows += [qa("Look.", "So.", tools=tools) for tools in ([], [TOOL], [more], [TOOL])]
    rows += [qa("\u2026", "!"), qa("\u2026", "?")]
    folder = prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *rows), heldout_fraction=0.4)
    assert {line["line"]: line["code"] for line in ledger(folder) if line["code"]} == {3: "copy", 7: "copy"}
