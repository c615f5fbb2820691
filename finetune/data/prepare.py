"""The data stage: rows of a card or of the user's files become two tokenised splits in the run folder."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.card import Card, card_folder, read_card
from finetune.data.excerpt import excerpts
from finetune.data.output import SPLITS, Gathered, write_splits
from finetune.data.readers import read_package
from finetune.data.rows import Row, listed, prompt_key, read_messages
from finetune.data.split import drop_copies, in_order, limit, split_card, split_fraction
from finetune.data.tokens import load_tokenizer, stop_tokens
from finetune.errors import DataError
from finetune.recipe import Data, Recipe
from finetune.rundir import RunDir, atomic_folder, sha256_file

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Splits:
    """Both splits of a run; columns as in `prepare`."""

    train: Dataset
    """What the adapter learns from."""
    heldout: Dataset
    """What base and tuned are compared on; its groups never train."""


def prepare(run_dir: RunDir) -> None:
    """Writes `run_dir.data`: train.parquet, heldout.parquet, ledger.jsonl, mask.txt and, last, report.json.

    Columns: row, group, input_ids, labels (-100 = not trained), prompt_length, messages, answer, choices. Raises
    DataError for rows, cards or chat templates that cannot be used, FetchError for a package that is not at hand.
    """
    from finetune.compose import read_recipe
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    gathered = gather(recipe)
    base = base_folder(recipe)
    tokenizer = load_tokenizer(base)
    with atomic_folder(run_dir.data) as folder:
        write_splits(gathered, recipe.data, tokenizer, stop_tokens(tokenizer, base), folder)


def load_splits(run_dir: RunDir) -> Splits:
    """Both prepared splits, in memory. Raises RunError when the data stage has not finished."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    run_dir.require(run_dir.data / "report.json", "data")
    # Not Dataset.from_parquet: it would write a second copy into a cache in the home folder.
    train, heldout = (Dataset(InMemoryTable(parquet.read_table(run_dir.data / f"{name}.parquet"))) for name in SPLITS)
    return Splits(train, heldout)


def gather(recipe: Recipe) -> Gathered:
    """The rows that `recipe.data` names, as conversations, each kept in a split or dropped with its reason."""
    data = recipe.data
    if bool(data.card) == bool(data.train_files):
        why = "both are given" if data.card else "neither is given"
        raise DataError(
            "DATA-011", "data.card or data.train_files must be given, not both", why, "data=files or data=NAME"
        )
    gathered = from_card(recipe) if data.card else from_files(data)
    for split, most in zip(SPLITS, (data.train_rows, data.heldout_rows), strict=True):
        limit(gathered.rows, split, most)
    refuse_overlap(gathered.rows)
    for split, fix in (
        ("train", "give more rows"),
        ("heldout", "data.heldout_files=[...] or a larger data.heldout_fraction"),
    ):
        if not in_order(gathered.rows, split):
            why = ", ".join(f"{n} {code}" for code, n in Counter(r.code for r in gathered.rows if r.code).items())
            raise DataError(
                "DATA-009", f"no {split} row is left of {len(gathered.rows)}", f"dropped: {why or 'none'}", fix
            )
    return gathered


def from_card(recipe: Recipe) -> Gathered:
    """The rows of a card: its sample rows, or those of its package, filtered, worded and split as the card says."""
    from finetune.fetch import cache_folder, fetch_package

    data, card = recipe.data, read_card(recipe.data.card)
    passed_over: dict[str, int] = {}
    if data.sample:
        path = card_folder() / card.sample
        rows = read_messages(path)
        for row in rows:
            row.file = card.sample
        split_fraction(rows, 1 / 3)
        source = {
            "kind": "sample rows",
            "files": {card.sample: sha256_file(path)},
            "licence": "Apache-2.0",
            "attribution": "",
        }
    elif card.reader == "files":
        raise DataError(
            "DATA-012",
            f"the card {card.name} has only sample rows",
            card.note,
            "data=files data.train_files=[tickets.jsonl] data.heldout_fraction=0.1, or data.sample=true",
        )
    else:
        wheel = fetch_package(
            card.package,
            card.version,
            card.sha256,
            cache=cache_folder(recipe),
            network=recipe.network,
            size_mb=card.size_mb,
            licence=card.licence,
        )
        _say(f"reading {card.title} from {wheel.name}")
        rows, passed_over = read_package(card, wheel)
        word(rows, card, data.excerpt_words or card.excerpt_words)
        split_card(rows, card)
        source = {
            "kind": "package",
            "files": {wheel.name: card.sha256},
            "licence": card.licence,
            "attribution": card.attribution,
        }
    source |= {"card": card.name, "card_sha256": sha256_file(card_folder() / f"{card.name}.yaml"), "title": card.title}
    source |= {"note": card.note, "licence_source": card.licence_source, "passed_over": passed_over}
    return Gathered(rows=rows, source=source, drop_long=card.too_long == "drop")


def from_files(data: Data) -> Gathered:
    """The rows of the user's own JSONL files. Copies are dropped; a question on both sides is an error."""
    files = {name: read_messages(Path(name).expanduser()) for name in [*data.train_files, *data.heldout_files]}
    rows = [row for name in files for row in files[name]]
    if len(files) > 1:
        for row in rows:
            row.id = f"{row.file}#{row.id}"
    if data.heldout_files:
        for name in files:
            for row in files[name]:
                row.split = "heldout" if name in data.heldout_files else "train"
        for split in SPLITS:
            drop_copies([row for row in rows if row.split == split])
    else:
        split_fraction(rows, data.heldout_fraction)
    hashes = {name: sha256_file(Path(name).expanduser()) for name in files}
    source = {"kind": "own files", "files": hashes, "licence": "the user's own", "attribution": "", "passed_over": {}}
    return Gathered(rows=rows, source=source, drop_long=False)


def word(rows: list[Row], card: Card, excerpt_words: int) -> None:
    """Turns fields into conversations by the card's templates; drops rows that its filters do not want.

    Further excerpts of long texts are appended to `rows`.
    """
    for row in list(rows):
        reason = _unwanted(row, card)
        if reason:
            row.drop(*reason)
            continue
        fields = row.fields
        if card.choices:
            row.label = card.labels[fields[card.label]] if card.labels else fields[card.label]
        row.group = fields[card.group]
        texts = [""]
        if card.text:
            texts = excerpts(fields[card.text], excerpt_words, card.excerpt, card.excerpts_per_text)
        further = [dataclasses.replace(row, id=f"{row.id}#{part}", part=part) for part in range(2, len(texts) + 1)]
        for each, excerpt in zip([row, *further], texts, strict=True):
            _fill(each, card, fields, excerpt)
        rows += further


def _unwanted(row: Row, card: Card) -> tuple[str, str] | None:
    """Why the card does not want the row (code, sentence), or None."""
    fields = row.fields
    for key in (card.label, card.group, card.text, *card.keep):
        if key and key not in fields:
            return "no-field", f"it has no {key}"
    for key, allowed in card.keep.items():
        if fields[key] not in allowed:
            return key, f"{key}={fields[key][:80]} is not among {', '.join(allowed)}"
    if card.text and len(fields[card.text].split()) < card.min_words:
        return "short", f"{len(fields[card.text].split())} words, the card wants {card.min_words}"
    if card.labels and fields[card.label] not in card.labels:
        return "class", f"{card.label}={fields[card.label]} belongs to no choice"
    return None


def _fill(row: Row, card: Card, fields: dict[str, str], excerpt: str) -> None:
    """Puts fields and excerpt into the card's templates."""
    values = {**fields, "excerpt": excerpt, "label": row.label}
    try:
        question, answer = card.question.format_map(values).strip(), card.answer.format_map(values).strip()
    except KeyError as error:
        row.drop("no-field", f"it has no {error.args[0]}")
        return
    except (ValueError, IndexError, AttributeError) as error:
        known = ", ".join(sorted(values))
        raise DataError(
            "DATA-008", f"card {card.name}: a template cannot be filled ({error})", f"fields: {known}"
        ) from None
    if not answer:
        row.drop("no-answer", "its answer is empty")
        return
    opening = [{"role": "system", "content": card.system}] if card.system else []
    row.messages = [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row.choices = list(card.choices)
    # What copies are looked for in: the part that the model sees (long texts with different heads can have the
    # same operative sentences), else the whole conversation.
    row.fields = {"text": excerpt} if card.near_duplicate else {}


def refuse_overlap(rows: list[Row]) -> None:
    """Raises DataError DATA-013 when a held-out question is also a training question."""
    train = {prompt_key(row): row for row in in_order(rows, "train")}
    both = [(row, train[key]) for row in in_order(rows, "heldout") if (key := prompt_key(row)) in train]
    if both:
        problems = [f"DATA-013 {held.where} asks what {trained.where} trains on" for held, trained in both]
        raise listed(problems, "held-out questions are also training questions; remove them from one side")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
