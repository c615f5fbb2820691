"""Whatever stands in a data card, a recipe or on the command line ends with a sentence or is taken."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from finetune.__main__ import read
from finetune.compose import _read_words, compose, expand_sweep, read_recipe, recipe_folders, recipe_yaml
from finetune.data.card import card_folder, read_card
from finetune.data.rows import Row
from finetune.data.wording import word
from finetune.errors import WeightsError
from finetune.foreign import check_folder
from finetune.inert import inert
from finetune.recipe import Recipe
from tests.fuzzing import Files, Parser, attempt, dumped, hunt, poked

YAML_TRICKS = (
    "!!timestamp x", "!!int ''", "!!float ''", "!!bool x", "!!binary é", "!!set {a}", "!!omap [a]", "!!pairs [a]",
    "!!python/object/apply:os.system [touch canary]", "!!python/name:os.system", "!!python/module:os", "2001-99-99",
    "2001-01-01t99:99:99z", "0b", "0x", "1:99:99", ".inf", ".nan", "~", "yes", "&a [*a]", "*a", "<<: 1", "? [a]",
    "? {a: b}",
    "|\n", "[" * 900, "{a: " * 400, "- " * 900, "!<tag:x,2000:y> z", "%YAML 9.9", "---\n---", "'", '"\\x0"', "\t",
    "@", "`",
    "${seed}", "${train.lr}", "${oc.env:HOME}", "${oc.decode:1}", "???", "${a", "${.}", "${..seed}",
    "1" * 5000, "1e999",
)  # fmt: skip
"""Texts that YAML or OmegaConf make something of."""


def twisted(text: str, draw: random.Random) -> bytes:
    """A YAML text with one of the tricks in place of a value, or between its lines."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    trick = draw.choice(YAML_TRICKS)
    if ":" in lines[at] and draw.randrange(4):
        lines[at] = lines[at].partition(":")[0] + ": " + trick
    else:
        lines.insert(at, trick)
    return "\n".join(lines).encode()


# --- cards ----------------------------------------------------------------------------------------------------------

FIELDS = {"text": "Whereas a text. " * 40, "key": "mit", "category": "Permissive", "language": "en", "exception": "no"}
CARDS = ("legal_licences", "math_reasoning", "general_instructions_following", "medical_pubmedqa", "support_tickets")


@cache
def cards() -> list[str]:
    return [path.read_text() for path in sorted(card_folder().glob("*.yaml")) if path.stem in CARDS]


def shaped_card(draw: random.Random) -> Files:
    """A card with other values in some places, as YAML or as the JSON that YAML takes, or with a trick in it."""
    text = draw.choice(cards())
    if draw.randrange(3) == 0:
        return {"card.yaml": twisted(text, draw)}
    value = poked(yaml.safe_load(text), draw)
    if isinstance(value, dict) and draw.randrange(3) == 0:
        value[draw.choice(("question", "answer"))] = draw.choice(
            ("{text}", "{", "{text:>99999999999}", "{text.__class__.__init__}", "{text[0]}", "{}", "{0}",
            "{text!r:{key}}",
             "{excerpt:{excerpt}}", "{text.format}", "{label:1000000000}", "}{", "{\x00}", "{key!x}")
        )  # fmt: skip
    return {"card.yaml": dumped(value, ensure_ascii=bool(draw.randrange(2)))}


def use_card(folder: Path) -> None:
    """As rows are worded by it."""
    card = read_card(str(folder / "card.yaml"))
    fields = dict(FIELDS) | {card.group: "g", "record": "r:1"}
    word([Row(file="f", line=1, id="r", sha256="", fields=fields)], card, card.excerpt_words)


# --- recipes --------------------------------------------------------------------------------------------------------

PLAIN = "# @package _global_\n# What it is for.\npurpose: a trial\nseed: 4\nmodel:\n  tiny: true\n  family: mixtral\n"
PLAIN += "train:\n  lr: 1e-4\n  max_steps: 3\nadapter:\n  rank_pattern: {q_proj: 8}\ndata:\n  train_files: [a.jsonl]\n"


@cache
def frozen() -> str:
    return recipe_yaml(Recipe(name="x"))


def shaped_recipe(draw: random.Random) -> Files:
    """A frozen recipe with other values or a trick in it."""
    text = draw.choice((frozen(), PLAIN))
    if draw.randrange(2):
        return {"recipe.yaml": twisted(text, draw)}
    return {"recipe.yaml": dumped(poked(yaml.safe_load(text), draw), ensure_ascii=True)}


def shaped_folder(draw: random.Random) -> Files:
    """A folder of settings with a recipe, a group and perhaps a strange file."""
    files = {"recipe/mine.yaml": shaped_recipe(draw)["recipe.yaml"]} if draw.randrange(2) else {}
    files = {"recipe/mine.yaml": b"# @package _global_\n" + twisted(PLAIN, draw), **files}
    if draw.randrange(3) == 0:
        files[draw.choice(("hydra/launcher/x.yaml", "model/base.yaml", "config.yaml", "data/x.yaml", "x.txt"))] = (
            twisted("a: 1\ndefaults:\n  - _self_\nhydra:\n  searchpath: [file:///]\n_target_: os.system", draw)
        )
    return files


def use_folder(folder: Path) -> None:
    """As `recipe=mine --config-dir FOLDER` reads it."""
    compose(["recipe=mine"], folder)


# --- words ----------------------------------------------------------------------------------------------------------

WORDS = (
    "recipe=legal_quickstart", "adapter.rank=8", "scale=rehearsal", "train.lr=1e-4,2e-4",
    "data.train_files=[a.jsonl]",
    "export.name='a b'", "adapter.rank_pattern={q_proj: 8}", "run=runs/x/0001", "-m", "--rows", "5", "--json", "plan",
    "data", "index", "verify", "serve=http://h", "~seed", "+seed=1", "++seed=1", "seed@x=1", "hydra.run.dir=/x",
    "licence.accept=" + "0" * 64, "train.report_to=[tensorboard]", "a=range(1,4)", "a=choice(1,2)", "a=glob(*)",
)  # fmt: skip
PIECES = (
    "=", ",", "[", "]", "{", "}", "(", ")", "'", '"', "\\", " ", "${seed}", "${oc.env:HOME}", "$", "@", ":", "/",
    "..", "~",
    "+", "*", "\x00", "\ud800", "é", "hydra", "choice(", "range(", "interval(", "tag(", "sort(", "shuffle(",
    "glob(", "null",
    "hf_" + "a" * 20, "1e999", "9" * 400, "__class__", "_target_", "[" * 200, "(" * 200, "{a:" * 100, "'" * 99,
)  # fmt: skip


def shaped_words(draw: random.Random) -> Files:
    """Words of which some are put together of pieces that mean something."""
    words = [draw.choice(WORDS) for _ in range(draw.randrange(1, 4))]
    for _ in range(draw.randrange(1, 3)):
        at = draw.randrange(len(words))
        cut = draw.randrange(len(words[at]) + 1)
        words[at] = words[at][:cut] + draw.choice(PIECES) + words[at][cut + draw.randrange(3) :]
    return {"words": "\n".join(words).encode("utf-8", "surrogatepass")}


def use_words(folder: Path) -> None:
    """As the command line reads them, up to the recipe; surrogates stand for bytes that are no UTF-8."""
    words = (folder / "words").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    request = read(words)
    expand_sweep(request.settings)
    _read_words(request.settings, recipe_folders())


TARGET = b"purpose: x\ntrain: {_target_: os.system}\n"


def padded(template: str = "{excerpt:>999999999}") -> bytes:
    """A card that is right but for its question."""
    value = yaml.safe_load(next(text for text in cards() if "operative" in text))
    return dumped(value | {"question": template})


# --- a base with its publisher's code --------------------------------------------------------------------------------

CODED = {
    "model_type": "mixtral",
    "auto_map": {"AutoModel": "m.M"},
    "text_config": {"layers": [{"trust_remote_code": True}, 1]},
}


def use_inert(folder: Path) -> None:
    """As `model.code=ignore` reads a folder, makes another in its place, and looks at that one again."""
    check_folder(folder, WeightsError, "ignore")
    with contextlib.redirect_stderr(io.StringIO()):
        made = inert(folder, Path(tempfile.gettempdir()))
    check_folder(made, WeightsError)  # nothing of it is left that this refuses


PARSERS = [
    Parser(
        name="data cards",
        weight=2,
        examples=[
            ({"card.yaml": b"title: 2001-99-99"}, "DATA-008"),
            ({"card.yaml": b"title: !!int ''"}, "DATA-008"),
            ({"card.yaml": b"title: \xff"}, "DATA-008"),
            ({"card.yaml": b"title: " + b"[" * 900}, "DATA-008"),
            ({"card.yaml": b'title: "\\ud800"'}, "DATA-008"),
            ({"card.yaml": padded()}, "DATA-008"),
            ({"card.yaml": padded("{excerpt.__class__}")}, "DATA-008"),
            ({"card.yaml": padded("{excerpt}")}, ""),
        ],
        parse=use_card,
        seeds=lambda: [{"card.yaml": text.encode()} for text in cards()],
        shaped=shaped_card,
    ),
    Parser(
        name="recipe.yaml",
        weight=0.2,
        examples=[
            ({"recipe.yaml": b"seed: \x01"}, "CFG-008"),
            ({"recipe.yaml": b"seed: !!timestamp x"}, "CFG-008"),
            ({"recipe.yaml": b"seed: 2001-01-01"}, "CFG-004"),
            ({"recipe.yaml": b"seed: " + b"[" * 900}, "CFG-008"),
        ],
        parse=lambda folder: read_recipe(folder / "recipe.yaml"),
        seeds=lambda: [{"recipe.yaml": frozen().encode()}, {"recipe.yaml": PLAIN.encode()}],
        shaped=shaped_recipe,
    ),
    Parser(
        name="folders of settings",
        weight=0.05,
        parse=use_folder,
        seeds=lambda: [{"recipe/mine.yaml": PLAIN.encode()}],
        shaped=shaped_folder,
    ),
    Parser(
        name="settings that would load code",
        weight=2,
        examples=[
            ({"config.json": b'{"auto_map": ' + b"[" * 9000 + b"]" * 9000 + b"}"}, "FRN-003"),
            ({"config.json": b'{"a": Infinity, "auto_map": {"AutoModel": "m.M"}}', "m.py": b"import os"}, ""),
            ({"config.json": b'{"\\ud800": {"trust_remote_code": true}}'}, ""),
        ],
        parse=use_inert,
        seeds=lambda: [{"config.json": dumped(CODED), "m.py": b"raise SystemExit", "tokenizer_config.json": b"{}"}],
        shaped=lambda draw: {"config.json": dumped(poked(CODED, draw)), draw.choice(("m.py", "m.json")): b"{}"},
    ),
    Parser(
        name="words of the command line",
        weight=6,
        examples=[({"words": b"-m\n" + b"\n".join([b"train.lr=1e-4,2e-4"] * 40)}, "CFG-003")],
        parse=use_words,
        seeds=lambda: [{"words": b"data\nrecipe=x\nadapter.rank=8"}, {"words": b"-m\ntrain.lr=1e-4,2e-4"}],
        shaped=shaped_words,
    ),
]
EXAMPLES = {
    "data cards": 40,
    "recipe.yaml": 30,
    "folders of settings": 8,
    "settings that would load code": 30,
    "words of the command line": 60,
}


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
@pytest.mark.parametrize("shaped", [False, True], ids=["bytes", "values"])
def test_strange_settings_end_with_a_sentence_or_are_taken(parser: Parser, shaped: bool, tmp_path: Path) -> None:
    hunt(parser, tmp_path, EXAMPLES[parser.name], shaped=shaped)


@pytest.mark.parametrize(
    ("parser", "files", "code"), [(parser, *example) for parser in PARSERS for example in parser.examples]
)
def test_what_once_went_wrong_ends_with_its_sentence(parser: Parser, files: Files, code: str, tmp_path: Path) -> None:
    assert attempt(parser, tmp_path, files) == code
