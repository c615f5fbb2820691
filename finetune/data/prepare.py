"""The data stage: rows of a card or of the user's files become two tokenised splits in the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.data.card import Card, card_folder, read_card
from finetune.data.excerpt import shorten
from finetune.data.readers import read_package
from finetune.data.rows import Row, listed, prompt_key, read_messages
from finetune.data.split import drop_copies, in_order, limit, split_card, split_fraction
from finetune.data.tokens import Tokens, load_tokenizer, marked, stop_tokens, tokenize
from finetune.errors import DataError
from finetune.recipe import Data, Recipe
from finetune.rundir import RunDir, atomic_folder, sha256_file, write_json, write_text

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True)
class Splits:
    """Both splits of a run; columns as in `prepare`."""

    train: Dataset
    heldout: Dataset


@dataclass(slots=True, kw_only=True)
class Gathered:
    """The rows of a recipe with their splits, and where they are from."""

    rows: list[Row]
    source: dict[str, Any]
    """Title, licence, attribution and hashes of the files, as report.json shows them."""
    drop_long: bool
    """Rows longer than `data.max_length` are dropped instead of ending the run."""


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
        raise DataError("DATA-011", "data.card or data.train_files must be given, not both", why, "data=files or data=NAME")
    gathered = from_card(recipe) if data.card else from_files(data)
    for split, most in zip(SPLITS, (data.train_rows, data.heldout_rows), strict=True):
        limit(gathered.rows, split, most)
    refuse_overlap(gathered.rows)
    for split, fix in (("train", "give more rows"), ("heldout", "data.heldout_files=[...] or a larger data.heldout_fraction")):
        if not in_order(gathered.rows, split):
            why = ", ".join(f"{n} {code}" for code, n in Counter(r.code for r in gathered.rows if r.code).items())
            raise DataError("DATA-009", f"no {split} row is left of {len(gathered.rows)}", f"dropped: {why or 'none'}", fix)
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
        source = {"kind": "sample rows", "files": {card.sample: sha256_file(path)}, "licence": "Apache-2.0", "attribution": ""}
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
        source = {"kind": "package", "files": {wheel.name: card.sha256}, "licence": card.licence, "attribution": card.attribution}
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
    """Turns fields into conversations by the card's templates; drops rows that its filters do not want."""
    for row in rows:
        fields = row.fields
        lacking = [k for k in (card.label, card.group, card.text, *card.keep) if k and k not in fields]
        if lacking:
            row.drop("no-field", f"it has no {lacking[0]}")
            continue
        refused = next((k for k, allowed in card.keep.items() if fields[k] not in allowed), None)
        if refused:
            row.drop(refused, f"{refused}={fields[refused][:80]} is not among {', '.join(card.keep[refused])}")
            continue
        if card.text and len(fields[card.text].split()) < card.min_words:
            row.drop("short", f"{len(fields[card.text].split())} words, the card wants {card.min_words}")
            continue
        given = fields[card.label] if card.label else ""
        if card.label and card.labels and given not in card.labels:
            row.drop("class", f"{card.label}={given} belongs to no choice")
            continue
        row.label = (card.labels[given] if card.labels else given) if card.choices else ""
        excerpt = shorten(fields[card.text], excerpt_words, card.excerpt) if card.text else ""
        values = {**fields, "excerpt": excerpt, "label": row.label}
        try:
            question, answer = card.question.format_map(values).strip(), card.answer.format_map(values).strip()
        except KeyError as error:
            row.drop("no-field", f"it has no {error.args[0]}")
            continue
        except (ValueError, IndexError, AttributeError) as error:
            known = ", ".join(sorted(values))
            raise DataError("DATA-008", f"card {card.name}: a template cannot be filled ({error})", f"fields: {known}") from None
        if not answer:
            row.drop("no-answer", "its answer is empty")
            continue
        row.messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row.group, row.choices = fields[card.group], list(card.choices)
        # what copies are looked for in: the long text, else the whole conversation
        row.fields = {"text": fields[card.text]} if card.text and card.near_duplicate else {}


def refuse_overlap(rows: list[Row]) -> None:
    """Raises DataError DATA-013 when a held-out question is also a training question."""
    train = {prompt_key(row): row for row in in_order(rows, "train")}
    both = [(row, train[key]) for row in in_order(rows, "heldout") if (key := prompt_key(row)) in train]
    if both:
        problems = [f"DATA-013 {held.where} asks what {trained.where} trains on" for held, trained in both]
        raise listed(problems, "held-out questions are also training questions; remove them from one side")


def write_splits(gathered: Gathered, data: Data, tokenizer: Any, stop: set[int], folder: Path) -> None:
    """Tokenises the kept rows and writes all files of the data stage into `folder`; report.json last."""
    tokens: dict[str, Tokens] = {}
    problems: list[str] = []
    kept = [row for split in SPLITS for row in in_order(gathered.rows, split)]
    for row in _progress(kept, "tokenising"):
        try:
            tokens[row.id] = tokenize(tokenizer, stop, row.messages, row.where)
        except DataError as error:
            problems.append(error.sentence())
    if problems:
        raise listed(problems, f"of {len(kept)} rows cannot be tokenised")
    long = [row for row in kept if len(tokens[row.id].input_ids) > data.max_length]
    if long and not gathered.drop_long:
        need = max(len(tokens[row.id].input_ids) for row in long)
        raise DataError(
            "MASK-001",
            f"{len(long)} of {len(kept)} rows would lose their answer to data.max_length={data.max_length}",
            f"the first is {long[0].where}; the longest row has {need} tokens",
            f"data.max_length={need}",
        )
    for row in long:
        row.drop("long", f"{len(tokens[row.id].input_ids)} tokens, data.max_length={data.max_length}")
    splits = {name: in_order(gathered.rows, name) for name in SPLITS}
    for name in SPLITS:
        if not splits[name]:
            why = f"all are longer than data.max_length={data.max_length}"
            raise DataError("DATA-009", f"no {name} row is left", why, "a larger data.max_length")
        _write_parquet(folder / f"{name}.parquet", splits[name], tokens)
    _write_ledger(folder / "ledger.jsonl", gathered.rows, tokens)
    shown = splits["train"][:3]
    parts = [f"row {r.id} ({tokens[r.id].trainable} tokens trained)\n{marked(tokenizer, tokens[r.id])}" for r in shown]
    write_text(folder / "mask.txt", "Trained tokens stand between ⟦ and ⟧.\n\n" + "\n\n".join(parts) + "\n")
    write_json(folder / "report.json", _report(gathered, data, tokenizer, splits, tokens))


def _report(gathered: Gathered, data: Data, tokenizer: Any, splits: dict[str, list[Row]], tokens: dict[str, Tokens]) -> Any:
    import tokenizers
    import transformers

    versions = {"finetune": __version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    report: dict[str, Any] = {
        "source": gathered.source,
        "rows_read": len(gathered.rows),
        "kept": sum(map(len, splits.values())),
        "dropped": dict(Counter(row.code for row in gathered.rows if row.code).most_common()),
        "splits": {},
        "settings": dataclasses.asdict(data),
        "template_sha256": template,
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "versions": versions,
    }
    digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode())
    for name, rows in splits.items():
        lengths = sorted(len(tokens[row.id].input_ids) for row in rows)
        report["splits"][name] = {
            "rows": len(rows),
            "groups": len({row.group for row in rows}),
            "classes": dict(sorted(Counter(row.label for row in rows if row.choices).items())),
            "tokens": sum(lengths),
            "trainable_tokens": sum(tokens[row.id].trainable for row in rows),
            "median_length": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        }
        for row in rows:
            digest.update(json.dumps([row.id, tokens[row.id].input_ids, tokens[row.id].labels]).encode())
    report["content_sha256"] = digest.hexdigest()
    return report


def _write_parquet(path: Path, rows: list[Row], tokens: dict[str, Tokens]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("row", pa.string()),
            ("group", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("prompt_length", pa.int32()),
            ("messages", pa.list_(message)),
            ("answer", pa.string()),
            ("choices", pa.list_(pa.string())),
        ]
    )
    values = [
        {
            "row": row.id,
            "group": row.group,
            "input_ids": tokens[row.id].input_ids,
            "labels": tokens[row.id].labels,
            "prompt_length": tokens[row.id].prompt_length,
            "messages": row.messages,
            "answer": row.messages[-1]["content"],
            "choices": row.choices,
        }
        for row in rows
    ]
    parquet.write_table(pa.Table.from_pylist(values, schema=schema), path)


def _write_ledger(path: Path, rows: list[Row], tokens: dict[str, Tokens]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            mine = tokens[row.id] if row.id in tokens else None
            line = {
                "file": row.file,
                "line": row.line,
                "row": row.id,
                "sha256": row.sha256,
                "verdict": "dropped" if row.code else "kept",
                "split": row.split,
                "code": row.code,
                "why": row.why,
                "tokens": len(mine.input_ids) if mine else 0,
                "trainable_tokens": mine.trainable if mine and not row.code else 0,
                "truncated": False,  # a row that does not fit is dropped or refused, never cut
            }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _progress(rows: list[Row], title: str) -> Iterator[Row] | Iterable[Row]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        _say(f"{title} {len(rows)} rows")
        return rows
    return track(rows, title, console=console, transient=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
