"""What of an evaluation set is found in a training text, what is not, and that the index keeps no text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data import contamination
from finetune.data.contamination import Hit, Index, Indexes, build, load
from finetune.data.items import Item, code_tokens, read_items, words
from finetune.errors import DataError

FERRY = (
    "A ferry leaves the northern harbour at 7 in the morning with 120 passengers, lets 35 of them off on the first "
    "island and takes 18 others aboard; how many passengers arrive at the second island?"
)
BREAD = "Which of the listed grains gives a dough the gluten that lets bread rise?"
SHORT = "Who painted the blue heron?"
TINY = "Define osmosis."
ANSWER = "Water passes a membrane towards the side where more is dissolved in it."
FILL = "The committee met on Tuesday. Its minutes were read and nobody objected to them."
ITEMS = [Item("ferry", FERRY), Item("bread", BREAD), Item("heron", SHORT), Item("osmosis", TINY, ANSWER)]

LOOP = '''
def longest_rise(values: list[int]) -> int:
    """The length of the longest stretch in which every value is larger than the one before it."""
    best = run = 1  # a single value rises
    for before, after in zip(values, values[1:]):
        run = run + 1 if after > before else 1
        best = max(best, run)
    return best if values else 0
'''


def index(*items: Item, kind: str = "text") -> Index:
    return build(items or ITEMS, "quiz", kind)


def kinds(hits: list[Hit]) -> dict[str, tuple[int, float]]:
    """How -> (length, share) of hits on one item."""
    assert len({hit.item for hit in hits}) <= 1
    return {hit.how: (hit.length, round(hit.share, 3)) for hit in hits}


def numbered(count: int, prefix: str = "w") -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", ITEMS[:3], ids=lambda item: item.id)
def test_an_item_is_found_whole_alone_and_inside_a_longer_text(item: Item) -> None:
    length = len(words(item.text))
    for text in (item.text, f"{FILL} {item.text} {FILL}", f"{FILL}\n{item.text}", f"{item.text}\n{FILL}"):
        assert index().hits(text) == [Hit(item.id, "exact", length, 1.0)]
    assert index().hits(FILL) == []


@pytest.mark.parametrize(
    "noise",
    [
        str.upper,
        lambda text: text.replace(" ", "  \n").replace(",", " --").replace("?", ""),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        lambda text: text.replace("a", "a\u200b").replace("e", "\xade"),
        lambda text: re.sub(r"\b(\w+)\b", r"“*\1*”", text),
    ],
    ids=["case", "punctuation", "width", "invisible", "marks"],
)
def test_noise_in_case_punctuation_width_and_invisible_characters_does_not_hide_an_item(noise: Any) -> None:
    for item in ITEMS[:3]:
        assert noise(item.text) != item.text
        assert [(hit.item, hit.how) for hit in index().hits(noise(item.text))] == [(item.id, "exact")]


def test_words_keep_digits_and_join_what_is_written_in_two_ways() -> None:
    assert words("It's 3.5 km², NOT_35!") == ["it", "s", "3", "5", "km2", "not", "35"]
    assert words("\u00e9t\u00e9 STRASSE") == words("e\u0301te\u0301 Stra\u00dfe") == ["\u00e9t\u00e9", "strasse"]
    assert words("\u0939\u093f\u0928\u094d\u0926\u0940 hindi") == ["\u0939\u093f\u0928\u094d\u0926\u0940", "hindi"]
    assert words("\u6771\u4eac Tower") == ["\u6771", "\u4eac", "tower"]


def test_a_run_of_8_words_is_found_and_one_of_7_is_not() -> None:
    text = numbered(30)
    made = index(Item("a", text))
    for start in (0, 9, 22):
        piece = text.split()[start : start + 8]
        assert kinds(made.hits(" ".join(["x", *piece, "y"]))) == {"run": (8, round(8 / 30, 3))}
        assert made.hits(" ".join(["x", *piece[1:], "y"])) == []


def test_the_share_of_13_word_runs_counts_from_13_words() -> None:
    text = numbered(30)
    made = index(Item("a", text))
    assert kinds(made.hits(numbered(12))) == {"run": (12, 0.4)}
    assert kinds(made.hits(numbered(13))) == {"run": (13, round(13 / 30, 3)), "ngram": (13, round(1 / 18, 3))}
    halves = text.split()
    halves[14] = "other"
    assert kinds(made.hits(" ".join(halves))) == {"run": (15, 0.5), "ngram": (29, round((2 + 3) / 18, 3))}
    moved = " ".join(text.split()[15:] + text.split()[:15])
    assert kinds(made.hits(moved)) == {"run": (15, 0.5), "ngram": (30, round(6 / 18, 3))}


@pytest.mark.parametrize("length", [7, 8, 12, 13])
def test_items_at_the_edges_of_the_rules_are_found_whole(length: int) -> None:
    made = index(Item("a", numbered(length)))
    assert kinds(made.hits(f"x {numbered(length)} y")) == {"exact": (length, 1.0)}
    shorter = kinds(made.hits(f"x {numbered(length - 1)} y"))
    assert shorter == ({"run": (length - 1, round((length - 1) / length, 3))} if length > 8 else {})


def test_a_run_needs_words_in_the_order_of_the_item() -> None:
    made = index(Item("a", numbered(20)))
    mixed = numbered(20).split()
    mixed[3:11] = reversed(mixed[3:11])
    assert kinds(made.hits(" ".join(mixed))) == {"run": (9, 0.45)}  # the nine words behind them
    assert made.hits(" ".join(reversed(numbered(20).split()))) == []


def test_a_changed_number_leaves_the_runs_on_both_of_its_sides() -> None:
    changed = FERRY.replace("120", "140")
    place, length = words(FERRY).index("120"), len(words(FERRY))
    found = kinds(index().hits(changed))
    assert found["run"] == (length - place - 1, round((length - place - 1) / length, 3))
    assert "exact" not in found and found["ngram"][1] < 1
    assert index().hits(SHORT.replace("blue", "grey")) == []


def test_a_short_question_is_found_only_whole() -> None:
    assert [hit.how for hit in index().hits(f"Tell me: {SHORT}")] == ["exact"]
    assert index().hits("Somebody painted the blue heron.") == []
    assert index().hits("Who painted the blue wagon?") == []


def test_an_answer_is_looked_for_from_8_words_and_behind_a_tiny_question() -> None:
    made = index(Item("long", "What is told?", numbered(9)), Item("short", numbered(10, "q"), "Because of the rain"))
    assert kinds(made.hits(f"The answer is {numbered(9)}")) == {"run": (9, 0.75)}  # the question has three words
    assert kinds(made.hits(f"What is told?\n{numbered(9)}")) == {"exact": (12, 1.0)}
    assert made.hits("Because of the rain") == []
    other = index(Item("a", "What is told about it?", numbered(9)))
    assert kinds(other.hits(f"x {numbered(9)} y")) == {"exact": (9, 1.0)}
    assert kinds(index().hits(f"{TINY} {ANSWER}")) == {"exact": (len(words(TINY + ANSWER)), 1.0)}


def test_a_character_of_a_script_without_spaces_is_half_a_word() -> None:
    text = "".join(chr(0x4E00 + 7 * i) for i in range(20))
    made = index(Item("a", text))
    assert kinds(made.hits(f"x{text}y")) == {"exact": (20, 1.0)}
    assert made.hits(text[:15]) == []
    assert kinds(made.hits(text[:16]))["run"] == (16, 0.8)


def test_of_an_item_the_longest_run_counts_and_a_whole_part_outdoes_all_others() -> None:
    made = index(Item("a", numbered(20, "q"), numbered(30)))
    for begin in (f"x {numbered(9, 'q')} y {numbered(15)}", f"x {numbered(15)} y {numbered(9, 'q')}"):
        hits = made.hits(begin)
        assert [(hit.how, hit.length) for hit in hits] == [("ngram", 15), ("run", 15)]
    assert kinds(made.hits(f"{numbered(20, 'q')} {numbered(29)}")) == {"exact": (20, 1.0)}


def test_several_items_and_several_indexes_are_told_apart() -> None:
    one, other = index(), build([Item("own", numbered(9)), Item("ferry", FERRY)], "exam", "text")
    found = Indexes([one, other]).hits(f"{BREAD} {FERRY} {numbered(9)}")
    assert [(name, hit.item, hit.how) for name, hit in found] == [
        ("quiz", "ferry", "exact"),
        ("quiz", "bread", "exact"),
        ("exam", "own", "exact"),
        ("exam", "ferry", "exact"),
    ]


# --- code -----------------------------------------------------------------------------------------------------------


def test_code_is_found_with_other_comments_and_layout() -> None:
    body = LOOP.split('"""')[0] + LOOP.split('"""')[2]
    body = (
        body.replace("# a single value rises", "# one")
        .replace("    ", "\t")
        .replace(" = ", "=")
        .replace(", ", ",\n\t\t")
    )
    found = index(Item("rise", LOOP), kind="code").hits(
        f"Here's mine:\n```python\n# a note\n{body}\n```\nIsn't it short?"
    )
    assert found == [Hit("rise", "code", len(code_tokens(LOOP)), 1.0)]


def test_part_of_code_is_found_from_13_tokens() -> None:
    made, tokens = index(Item("rise", LOOP), kind="code"), code_tokens(LOOP)
    assert len(tokens) > 50
    assert kinds(made.hits(" ".join(["pass", *tokens[20:33], "pass"]))) == {"code": (13, round(13 / len(tokens), 3))}
    assert made.hits(" ".join(["pass", *tokens[20:32], "pass"])) == []


def test_code_with_renamed_variables_is_missed_and_the_limits_say_so() -> None:
    made = index(Item("rise", LOOP), kind="code")
    names = ("longest_rise", "values", "best", "run", "before", "after")
    renamed = re.sub(rf"\b({'|'.join(names)})\b", lambda m: f"v{names.index(m[1])}", LOOP)
    assert made.hits(renamed) == []
    assert any("renamed variables" in limit for limit in made.limits())
    assert not any("renamed variables" in limit for limit in index().limits())


def test_code_tokens_know_the_comments_and_strings_of_several_languages() -> None:
    expected = ["f", "(", '"ab"', ",", "1.5", ")", ";", "x", "==", "y", ";"]
    assert code_tokens('f("a b", 1.5); // one\nx == y; /* two */') == expected
    assert code_tokens("# three\nf('a b',\\\n 1.5);\n  // four\nx==y;") == expected
    assert code_tokens("-- five\nf('a  b' , 1.5) ; x == y;") == expected
    assert code_tokens("this.#own = 1 # six") == ["this", ".", "#", "own", "=", "1"]
    assert code_tokens('a // b\n"it\'s"') == ["a", "//", "b", '"it\'s"']


def test_many_beginnings_of_comments_without_an_end_are_read_in_one_pass() -> None:
    assert len(code_tokens("/* " * 3000 + "'''" + '"' * 2001)) > 6000


# --- what is not found ----------------------------------------------------------------------------------------------


def test_a_paraphrase_and_a_translation_are_missed_and_the_limits_say_so() -> None:
    told = (
        "In the morning a boat with 120 people sets out; at one island 35 go ashore and 18 come on. How many are left?"
    )
    assert index().hits(told) == []
    assert index().hits("Eine Fähre legt um 7 Uhr im nördlichen Hafen ab und hat 120 Passagiere.") == []
    limits = " ".join(index().limits())
    assert all(word in limits for word in ("paraphrase", "translation", "base model saw", "8 words"))


def test_items_that_are_too_short_are_counted_among_the_limits() -> None:
    made = index(*ITEMS, Item("t1", "Why?"), Item("t2", "Say yes now"), Item("t3", ""))
    assert len(made) == 7
    assert made.limits()[-1] == "quiz: 3 of its 7 items: they have fewer than 4 words"
    with pytest.raises(DataError, match="DATA-020 nothing of quiz can be looked for: no item has 4 words"):
        index(Item("t1", "Why?"))
    with pytest.raises(DataError, match="no item has 13 tokens of code"):
        index(Item("t1", "x = 1"), kind="code")


WORDING = "Answer the following multiple choice question with one letter, A B C or D:"


def test_the_wording_of_a_benchmark_is_no_hit_and_its_questions_still_are() -> None:
    made = index(*(Item(f"q{i}", f"{WORDING} {numbered(14, f'q{i}x')}") for i in range(6)))
    assert made.hits(f"{WORDING} What else is there to be asked of anybody?") == []
    assert made.hits(f"{WORDING} q3x0 and so on to the end") == []  # one word more than the wording
    assert kinds(made.hits(f"{WORDING} {numbered(14, 'q3x')}")) == {"exact": (28, 1.0)}
    assert kinds(made.hits(numbered(14, "q3x")))["run"] == (14, 0.5)
    assert any("phrases in more than 5 of its texts" in limit for limit in made.limits())


def test_a_phrase_in_five_items_is_not_yet_wording() -> None:
    made = index(*(Item(f"q{i}", f"{WORDING} {numbered(14, f'q{i}x')}") for i in range(5)))
    assert len(made.hits(WORDING)) == 2 * 5
    assert not any("phrases" in limit for limit in made.limits())


def test_an_item_of_nothing_but_wording_is_found_whole() -> None:
    made = index(Item("bare", WORDING), *(Item(f"q{i}", f"{WORDING} {numbered(14, f'q{i}x')}") for i in range(6)))
    assert kinds(made.hits(f"{FILL} {WORDING} {FILL}")) == {"exact": (14, 1.0)}
    assert made.hits(" ".join(words(WORDING)[:9])) == []


def test_equal_texts_are_one_and_do_not_make_each_other_wording() -> None:
    made = index(*(Item(f"q{i}", FERRY) for i in range(20)))
    assert [(hit.item, hit.how) for hit in made.hits(FERRY.upper())] == [("q0", "exact")]
    assert len(made) == 20


# --- the file -------------------------------------------------------------------------------------------------------


def test_an_index_file_has_none_of_the_words(tmp_path: Path) -> None:
    index().save(tmp_path / "quiz.index")
    data = (tmp_path / "quiz.index").read_bytes().lower()
    assert b"ferry" in data  # an id, which reports need
    every = {word for item in ITEMS for word in words(item.text + " " + item.answer) if len(word) > 4} - {
        "ferry",
        "bread",
    }
    every -= {"heron", "osmosis", "first"}
    assert len(every) > 20
    for word in every:
        for encoding in ("ascii", "utf-16-le", "utf-32-le"):
            assert word.encode(encoding) not in data


def test_an_index_comes_back_from_its_file_and_equal_items_give_equal_bytes(tmp_path: Path) -> None:
    for made in (index(), index(Item("rise", LOOP), kind="code")):
        made.save(tmp_path / "a.index")
        back = load(tmp_path / "a.index")
        back.save(tmp_path / "deep" / "b.index")
        build(ITEMS if made.kind == "text" else [Item("rise", LOOP)], "quiz", made.kind).save(tmp_path / "c.index")
        written = [(tmp_path / name).read_bytes() for name in ("a.index", "deep/b.index", "c.index")]
        assert written[0] == written[1] == written[2]
        text = f"{FERRY} {BREAD} {LOOP}"
        assert back.hits(text) == made.hits(text) != []
        assert back.limits() == made.limits() and (back.name, back.kind, len(back)) == ("quiz", made.kind, len(made))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.index", "b.index", "c.index", "deep"]


def test_a_damaged_index_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "quiz.index"
    index().save(path)
    good, before = path.read_bytes(), index().hits(FERRY + SHORT)
    refused = 0
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x5A]) + good[place + 1 :])
        try:
            assert load(path).hits(FERRY + SHORT) == before  # a byte that says nothing, such as a date
        except DataError as error:
            refused += 1
            assert error.code == "DATA-020" and f"out={path}" in error.fix
    assert refused > 0.7 * len(range(0, len(good), 3))
    for cut in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(DataError, match="DATA-020"):
            load(path)


def test_a_foreign_file_and_another_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "foreign.npz"
    with pytest.raises(DataError, match="DATA-020"):
        load(foreign)
    np.savez(foreign, keys=np.arange(3))
    with pytest.raises(DataError, match="DATA-020"):
        load(foreign)
    with foreign.open("wb") as handle:
        np.save(handle, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="allow_pickle=False"):
        load(foreign)
    index().save(foreign)
    with np.load(foreign) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["keys"][0] -= np.uint64(1)
    np.savez(foreign, allow_pickle=False, **arrays)
    with pytest.raises(DataError, match="its hashes are not those that were written"):
        load(foreign)
    monkeypatch.setattr(contamination, "FORMAT", 0)
    index().save(tmp_path / "old.index")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"its format is 0, and 1 can be read\. Try: python -m finetune data index"):
        load(tmp_path / "old.index")


# --- work -----------------------------------------------------------------------------------------------------------


def test_a_row_is_read_and_hashed_once_for_all_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = index(Item("rise", LOOP), kind="code")
    many = [index(), index(Item("a", numbered(20))), index(Item("b", numbered(5))), code, code]
    calls: list[str] = []
    for name in ("words", "code_tokens", "_hashes"):
        real = getattr(contamination, name)
        monkeypatch.setattr(contamination, name, lambda found, real=real, name=name: calls.append(name) or real(found))
    assert len(Indexes(many).hits(f"{FERRY} {numbered(20)}\n{LOOP}")) == 5
    assert sorted(calls) == ["_hashes", "_hashes", "code_tokens", "words"]
    calls.clear()
    Indexes(many[:3]).hits(FERRY)
    assert calls == ["words", "_hashes"]


def test_a_text_that_is_shorter_than_a_run_or_empty_has_no_hits() -> None:
    both = Indexes([index(), index(Item("rise", LOOP), kind="code")])
    for text in ("", "?", "one", "one two three", "\u6771", "\ud800", '"""'):
        assert both.hits(text) == []


def test_hashes_of_runs_differ_by_every_word_and_by_their_order() -> None:
    values = contamination._hashes(numbered(40).split())
    for size in (1, 4, 8, 13):
        runs = contamination._runs(values, size)
        assert len(set(runs.tolist())) == len(runs) == 41 - size
        for place in range(size):
            other = values.copy()
            other[20 + place] ^= np.uint64(1)
            changed = np.flatnonzero(contamination._runs(other, size) != runs)
            assert changed.tolist() == list(range(21 + place - size, min(21 + place, len(runs))))
        alone = [contamination._runs(values[i : i + size], size)[0] for i in range(41 - size)]
        assert alone == runs.tolist()
    steps = [contamination._joined(values[:1] + np.uint64(i), values[1:2], 0)[0] for i in range(9)]
    assert len({(b - a) % 2**64 for a, b in zip(map(int, steps), map(int, steps[1:]), strict=False)}) == 8  # not linear
    assert contamination._runs(values[:2], 2) != contamination._runs(values[1::-1], 2)


# --- evaluation files -----------------------------------------------------------------------------------------------


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_items_are_read_from_the_usual_shapes_of_evaluation_files(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "First?"}]
    turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Then?"}]
    last = {"role": "assistant", "content": "No."}
    path = written(
        tmp_path / "set.jsonl",
        {"text": FERRY, "subject": "sums"},
        {"question": "Which one?", "choices": ["red", "blue"], "answer": 1, "id": 7},
        {"question": BREAD, "choices": {"text": ["rye", "oat"], "label": ["A", "B"]}, "answer": "A"},
        {"prompt": "def f():", "canonical_solution": "    return 1", "task_id": "he/1"},
        {"messages": [*turns, last]},
        {"prompt": turns, "answer": None},
        {"question": FERRY, "answer": 103},
    )
    assert read_items(path) == [
        Item("set.jsonl:1", FERRY),
        Item("7", "Which one?\nred\nblue", "blue"),
        Item("set.jsonl:3", BREAD, "rye"),
        Item("he/1", "def f():", "    return 1"),
        Item("set.jsonl:5", "First?\nThen?", "No."),
        Item("set.jsonl:6", "First?\nThen?"),
        Item("set.jsonl:7", FERRY, "103"),
    ]


def test_faults_of_an_evaluation_file_are_told_by_line(tmp_path: Path) -> None:
    path = written(
        tmp_path / "set.jsonl",
        {"text": FERRY, "id": "a"},
        [1],
        {"topic": "x"},
        {"text": 3},
        {"question": " "},
        {"question": BREAD, "answer": ["x"]},
        {"messages": ["hello"]},
        {"text": BREAD, "id": "a"},
    )
    with path.open("ab") as handle:
        handle.write(b"{broken\n")
    with pytest.raises(DataError) as told:
        read_items(path)
    lines = str(told.value).splitlines()
    assert lines[0].endswith(f"8 faults in {path}:")
    codes = [re.findall(r"(DATA-\d+) \S+:(\d+)", line)[0] for line in lines[1:]]
    expected = ["001", "001", "001", "003", "001", "001", "002", "022"]
    assert codes == [(f"DATA-{code}", str(line)) for line, code in enumerate(expected, 2)]
    assert "ferry leaves" not in str(told.value)


def test_an_empty_evaluation_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-006"):
        read_items(written(tmp_path / "set.jsonl"))
