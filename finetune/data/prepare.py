"""The data stage, read it first: files or a card -> parts -> verdicts -> two splits and a ledger, once per content."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.card import read_card
from finetune.data.files import Block, Source, blocks, sources
from finetune.data.mapping import mapped
from finetune.data.output import Told, write_all, write_rejected
from finetune.data.page import show_report
from finetune.data.part import Job, Work, of_card
from finetune.data.passages import CHARACTERS
from finetune.data.records import records
from finetune.data.rows import Row
from finetune.data.shape import FORMATS, detect, renamed, usual
from finetune.data.store import Store, address_of, decoder, put, require_unchanged
from finetune.data.verdicts import Facts, decide
from finetune.data.wording import SPLITS, about, from_card
from finetune.errors import DataError
from finetune.families import FAMILIES
from finetune.recipe import Data, Recipe
from finetune.rundir import RunDir, atomic_folder, read_json

if TYPE_CHECKING:
    from datasets import Dataset

PREPARED = "prepared"
"""Folder of the cache that has prepared sets."""

CARD_BLOCK = 500
"""Rows of a card that make one part."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Both splits of a run; columns as in `prepare`."""

    train: Dataset
    """What the adapter learns from."""
    heldout: Dataset
    """What base and tuned are compared on; its groups never train."""


def prepare(run_dir: RunDir) -> None:
    """Writes `run_dir.data`: train.arrow, heldout.arrow, ledger.jsonl, mask.txt and, last, report.json.

    Columns: row, group, input_ids, labels (-100 = not trained), prompt_length, messages, answer, choices. Raises
    DataError for rows, cards or chat templates that cannot be used, FetchError for a package that is not at hand. Then
    `run_dir.rejected` has the ledger with every fault.
    """
    from rich.console import Console

    from finetune.compose import read_recipe
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    folder = prepared(recipe, base_folder(recipe), run_dir.rejected)
    _look_ahead(recipe)
    put(folder, run_dir.data)
    show_report(read_json(run_dir.data / "report.json"), Console())


def _look_ahead(recipe: Recipe) -> None:
    """What `evaluate` will read, looked at now: not when training is over, on a machine that may have no network."""
    if recipe.evaluate.general:
        from finetune.data.general import fetch_general

        fetch_general(recipe)
    if recipe.evaluate.drift:
        from finetune.data.prompts import own_prompts

        own_prompts(recipe)


def load_splits(run_dir: RunDir) -> Splits:
    """Both prepared splits, mapped from disk. Raises RunError when the data stage has not finished."""
    from finetune.data.output import dataset

    run_dir.require(run_dir.data / "report.json", "data")
    train, heldout = (dataset(run_dir.data / f"{name}.arrow") for name in SPLITS)
    return Splits(train, heldout)


def require_rows(run_dir: RunDir, recipe: Recipe) -> None:
    """Nothing, or RunError when the rows of a run are not prepared, or no longer as they were (`require_unchanged`)."""
    from finetune.fetch import cache_folder

    run_dir.require(run_dir.data / "report.json", "data")
    require_unchanged(run_dir, cache_folder(recipe) / PREPARED)


def load_packed(run_dir: RunDir) -> Dataset | None:
    """The packed training sequences, columns input_ids, labels and position_ids; None where rows are not packed."""
    from finetune.data.output import dataset

    path = run_dir.data / "packed.arrow"
    return dataset(path) if path.exists() else None


def prepared(recipe: Recipe, base: Path, rejected: Path | None = None) -> Path:
    """The folder of the prepared set of a recipe in the cache, made if its content is not there yet.

    `base` is the folder with the tokenizer. A second process that wants the same set waits for the first.
    """
    found = inputs(recipe)
    store = _store(recipe, base, found)
    if store.is_ready() and not store.parts.exists():
        print(f"data: prepared before, {store.folder}", file=sys.stderr, flush=True)
        return store.folder
    with store.lock():
        if not store.is_ready():
            told = Told(source=found.source, address=store.address, notes=[], limits=[])
            try:
                _make(recipe, base, found, store, told, rejected)
            except DataError:
                store.sweep()  # mended rows have another address: these parts would never be used
                raise
        store.sweep()
    return store.folder


def store_of(recipe: Recipe, base: Path) -> Store:
    """Where the prepared set of a recipe is, or would be."""
    return _store(recipe, base, inputs(recipe))


def _store(recipe: Recipe, base: Path, found: Inputs) -> Store:
    from finetune.fetch import cache_folder

    address = address_of(recipe, base, found.source, [(s.name, s.path, side) for s, side in found.files])
    return Store(cache_folder(recipe) / PREPARED, address)


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What a recipe reads."""

    source: dict[str, Any]
    """Title, licence, attribution; hashes of the files are added."""
    files: list[tuple[Source, str]]
    """The user's files, each with its side: `train`, `heldout`, or empty where a fraction is held out."""


def inputs(recipe: Recipe) -> Inputs:
    """The files or the card of a recipe; nothing is read yet. Raises DataError when there are both or none."""
    data = recipe.data
    if bool(data.card) == bool(data.train_files):
        why = "both are given" if data.card else "neither is given"
        raise DataError(
            "DATA-011", "data.card or data.train_files must be given, not both", why, "data=files or data=NAME"
        )
    if data.card:
        return Inputs(source=about(read_card(data.card), data.sample), files=[])
    side = "train" if data.heldout_files else ""
    every = sources([*data.train_files, *data.heldout_files])
    held = {s.path.resolve() for s in sources(data.heldout_files)} if data.heldout_files else set()
    files = [(s, "heldout" if s.path.resolve() in held else side) for s in every]
    source = {"kind": "own files", "licence": "the user's own", "attribution": "", "passed_over": {}}
    return Inputs(source=source, files=files)


def _make(recipe: Recipe, base: Path, found: Inputs, store: Store, told: Told, rejected: Path | None) -> None:
    data = recipe.data
    if told_of := template_note(recipe, base):
        told.notes.append(told_of)
    long = data.too_long
    if long == "auto":
        long = read_card(data.card).too_long if data.card else "error"
    near = data.near_duplicates != "off" and not data.card
    work = Work(data=data, base=base, cut=long, near=near)
    facts = Facts(mapped(work, _jobs(recipe, found, told), store.parts, store.key, data.workers))
    if ignored := facts.ignored:
        told.notes.append(f"columns without a meaning here: {', '.join(ignored)}")
    finder = None
    if near:
        from finetune.data.copies import near_finder

        finder = near_finder(data, store.parts)
    try:
        told.notes += decide(facts, data, given=bool(data.card), long=long, near=finder)
    except DataError as error:
        if rejected is not None:
            with atomic_folder(rejected) as folder:
                write_rejected(facts, data, told, folder, error.sentence())
            error.why = f"{error.why}; {rejected / 'ledger.jsonl'} names every row".removeprefix("; ")
            raise DataError(error.code, error.what, error.why, error.fix) from None
        raise
    told.limits = _limits(data)
    with atomic_folder(store.folder) as folder:
        write_all(facts, data, decoder(base), told, folder)
        store.seal(folder)


def template_note(recipe: Recipe, base: Path) -> str:
    """How the base's chat template differs from those that its family was published with, or an empty text."""
    from finetune.foreign.templates import about

    if recipe.model.tiny or recipe.model.family not in FAMILIES:
        return ""
    return about(base, FAMILIES[recipe.model.family].chat_templates).difference


def _jobs(recipe: Recipe, found: Inputs, told: Told) -> Iterator[Job]:
    """Every block of every file, or of the card's rows, in order."""
    if not found.files:
        gathered = from_card(recipe)
        told.source |= gathered.source
        by_file: dict[str, list[Row]] = {}
        for row in gathered.rows:
            by_file.setdefault(row.file, []).append(row)
        for rows in by_file.values():
            for start in range(0, len(rows), CARD_BLOCK):
                yield Job(block=of_card(rows[start : start + CARD_BLOCK]), format="", side="", prefix="")
        return
    for source, side in found.files:
        stream = blocks(source, CHARACTERS * recipe.data.max_length)
        first = list(islice(stream, 1))
        kind, own = shape_of(first, recipe.data)
        told.notes.append(f"{source.name}: {kind}" + ("" if recipe.data.format != "auto" else ", by its keys"))
        prefix = f"{source.name}#" if len(found.files) > 1 else ""
        for block in chain(first, stream):
            yield Job(block=block, format=kind, side=side, prefix=prefix, usual=own)


def shape_of(first: list[Block], data: Data) -> tuple[str, list[str]]:
    """The format of a file and its usual columns, by the rows at its beginning that can be read.

    The format is what the recipe says, else that of the first row with the keys of one.
    """
    read = (record.value for block in first for record in records(block))
    values = [renamed(value, data.columns) for value in read if isinstance(value, dict)]
    found = (kind for value in values if (kind := detect(value)))
    return data.format if data.format != "auto" else next(found, next(iter(FORMATS))), usual(values)


def _limits(data: Data) -> list[str]:
    """What the checks of this run cannot find."""
    told = [
        "leaks: a held-out question in other words, behind other turns, before the last answer of a held-out row, or "
        "under another system message"
    ]
    if data.near_duplicates != "off" and not data.card:
        from finetune.data.near import chance

        near, more = data.near_share, min(1.0, data.near_share + 0.1)
        told.append(
            f"near duplicates: of pairs with {near:.0%} of their five-word runs in common {chance(near):.0%} are "
            f"found, with {more:.0%} {chance(near, more):.0%}; the same said in other words is not"
        )
    if data.near_duplicates == "report" and not data.card:
        from finetune.data.copies import LEAST, TEMPLATE

        told.append(
            f"near duplicates of held-out rows: wording that {TEMPLATE} rows share (in small sets a quarter of them, "
            f"{LEAST} at least) counts as a template, so a text in as many variants may stand on both sides"
        )
    if data.privacy != "off":
        told.append("personal data: names, addresses and whatever has no pattern or check digit")
    if data.benchmarks:
        from finetune.data.contamination import load

        told += [limit for path in data.benchmarks for limit in load(Path(path).expanduser()).limits()]
    return list(dict.fromkeys(told))
