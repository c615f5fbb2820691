"""What the data stage leaves: two splits, the ledger, the mask to look at, the report. Streamed from the parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.tokens import IGNORED, Tokens, marked
from finetune.data.verdicts import FAULT, HELDOUT, TRAIN, Facts, dropped, in_order
from finetune.recipe import Data
from finetune.rundir import sha256_file, write_json, write_text

NAMES = {TRAIN: "train", HELDOUT: "heldout"}
BATCH = 500
"""Rows of a record batch in the splits."""


@dataclass(kw_only=True, slots=True)
class Told:
    """What the report says beside the counts."""

    source: dict[str, Any]
    """Title, licence, attribution and hashes of the files."""
    address: dict[str, Any]
    """Everything that the prepared set depends on, as the cache keeps it."""
    notes: list[str]
    """Sentences for a person."""
    limits: list[str]
    """What the checks do not find."""


def write_all(facts: Facts, data: Data, decode: Any, told: Told, folder: Path) -> dict[str, Any]:
    """Writes every file of the data stage into `folder`, report.json last; the report."""
    splits: dict[str, Any] = {}
    digest = hashlib.sha256(json.dumps(told.address, sort_keys=True).encode())
    shown: list[str] = []
    for split, name in NAMES.items():
        path = folder / f"{name}.arrow"
        _write_split(facts, split, path)
        splits[name] = _summary(facts, split, path, digest)
    for row in _first(folder / "train.arrow", 3):
        tokens = Tokens(input_ids=row["input_ids"], labels=row["labels"])
        shown.append(f"row {row['row']} ({tokens.trainable} tokens trained)\n{marked(decode, tokens)}")
    write_text(folder / "mask.txt", "Trained tokens stand between ⟦ and ⟧.\n\n" + "\n\n".join(shown) + "\n")
    counts = write_ledger(facts, folder / "ledger.jsonl")
    report = report_of(facts, data, told, counts) | {"splits": splits, "content_sha256": digest.hexdigest()}
    if data.packing:
        from finetune.data.packing import pack

        report["packing"] = pack(folder / "train.arrow", folder / "packed.arrow", data.max_length)
    report["sha256"] = {path.name: sha256_file(path) for path in sorted(folder.glob("*.arrow"))}
    write_json(folder / "report.json", report)
    return report


def write_rejected(facts: Facts, data: Data, told: Told, folder: Path, error: str) -> None:
    """The ledger and the report of data that cannot be used, so that every fault can be found."""
    counts = write_ledger(facts, folder / "ledger.jsonl", rejected=True)
    write_json(folder / "report.json", report_of(facts, data, told, counts) | {"error": error})


def report_of(facts: Facts, data: Data, told: Told, counts: Counter[str]) -> dict[str, Any]:
    """Totals of the ledger and where they are from."""
    codes, further = dropped(facts), int(facts.column("further").sum())
    return {
        "source": told.source,
        "rows_read": len(facts) - further,
        "further_excerpts": further,
        "kept": counts["kept"],
        "dropped": codes,
        "verdicts": {verdict: counts[verdict] for verdict in ("kept", "dropped", "error")},
        "truncated": counts["truncated"],
        "found": {name.partition(":")[2]: n for name, n in sorted(counts.items()) if name.startswith("found:")},
        "notes": told.notes,
        "not_detected": told.limits,
        "settings": dataclasses.asdict(data),
        "address": told.address,
    }


def write_ledger(facts: Facts, path: Path, *, rejected: bool = False) -> Counter[str]:
    """Writes a line for every row that came in; counts verdicts, cuts, and what was found in the rows.

    A row is an `error` when its fault ends the run, `dropped` when it is left out, else `kept`.
    """
    counts: Counter[str] = Counter()
    columns = [
        "file",
        "line",
        "nth",
        "id",
        "sha256",
        "why",
        "tokens",
        "trainable",
        "truncated",
        "privacy",
        "flags",
        "language",
        "benchmarks",
    ]
    fatal = _fatal(facts, rejected)
    row = -1
    with path.open("w", encoding="utf-8") as handle:
        for part in facts.table.select(columns).to_batches():
            for fact in part.to_pylist():
                row += 1
                code = facts.codes[facts.code[row]]
                verdict = ("error" if facts.code[row] in fatal else "dropped") if code else "kept"
                counts[verdict] += 1
                counts["truncated"] += fact["truncated"] and not code
                found = [*fact["privacy"].split(","), *(f"quality {f}" for f in fact["flags"].split(",") if f)]
                counts.update(f"found:{what}" for what in found if what)
                counts.update(["found:benchmark items"] if fact["benchmarks"] else [])
                line = {
                    "file": fact["file"],
                    "line": fact["line"],
                    "sha256": fact["sha256"],
                    "verdict": verdict,
                    "code": code,
                    "tokens": fact["tokens"],
                    "trainable_tokens": 0 if code else fact["trainable"],
                    "truncated": fact["truncated"] and not code,
                    "row": fact["id"],
                    "split": NAMES[int(facts.split[row])] if facts.split[row] else "",
                    "why": fact["why"] or (_why(facts, row, code) if code else ""),
                }
                extra = {k: fact[k] for k in ("nth", "privacy", "flags", "language", "benchmarks") if fact[k]}
                if not code and facts.other[row] >= 0:
                    extra["resembles"] = facts.where(int(facts.other[row]))
                handle.write(json.dumps(line | extra, ensure_ascii=False) + "\n")
    return counts


def _fatal(facts: Facts, rejected: bool) -> set[int]:
    """Codes of faults that nothing allowed to be dropped: those of a run that ends."""
    return {i for i, code in enumerate(facts.codes) if FAULT.fullmatch(code)} if rejected else set()


def _why(facts: Facts, row: int, code: str) -> str:
    """The sentence of a verdict that was made over all rows."""
    other = int(facts.other[row])
    if other >= 0:
        words = {"copy": "same words as", "near-copy": "nearly the same words as", "leak": "asks what is held out in"}
        words |= {"DATA-002": "has the id of", "DATA-013": "trains on what is held out in"}
        return f"{words[code] if code in words else 'same words as'} {facts.where(other)}"
    return {
        "rows-limit": "data.train_rows or data.heldout_rows is reached",
        "mixture": "its file has its share by data.mixture",
        "group-held-out": "newer rows of its group are held out",
    }.get(code, "")


def _write_split(facts: Facts, split: int, path: Path) -> None:
    """The rows of a split as an Arrow stream, in the order of training. Never more than a batch is in memory."""
    import pyarrow as pa
    from pyarrow import compute

    from finetune.data.part import rows_schema

    order = in_order(facts, split)
    in_file_order = bool((order[1:] > order[:-1]).all())
    place = np.full(len(facts), -1, dtype=np.min_scalar_type(-len(facts)))
    place[order] = np.arange(len(order), dtype=place.dtype)
    del order
    target = path if in_file_order else path.with_suffix(".unordered")
    places: list[Any] = []
    start = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, rows_schema()) as stream:
        for part in facts.table.select(["made"]).to_batches():
            at = place[start : start + len(part)]
            start += len(part)
            if (at < 0).all():
                continue
            made = compute.list_flatten(part["made"])
            of_row = at[compute.list_parent_indices(part["made"]).to_numpy()]
            for first in range(0, len(made), BATCH):
                here = of_row[first : first + BATCH]
                kept = pa.RecordBatch.from_struct_array(made.slice(first, BATCH)).filter(pa.array(here >= 0))
                if kept.num_rows:
                    stream.write_batch(kept)
                if not in_file_order:
                    places.append(here[here >= 0])
    if not in_file_order:
        _reorder(target, np.argsort(np.concatenate(places), kind="stable"), path)
        target.unlink()


def _reorder(source: Path, order: Any, target: Path) -> None:
    """Writes the rows of an Arrow stream in another order, a batch at a time from the mapped file."""
    import pyarrow as pa

    mapped = dataset(source).with_format("arrow")
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, mapped.data.schema) as stream:
        for start in range(0, len(order), BATCH):
            for batch in mapped.select(order[start : start + BATCH])[:].combine_chunks().to_batches():
                stream.write_batch(batch)


def dataset(path: Path) -> Any:
    """A split as a memory-mapped dataset."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    return Dataset.from_file(str(path))


def _summary(facts: Facts, split: int, path: Path, digest: Any) -> dict[str, Any]:
    """Counts of a split, read once more from the file; its rows enter the digest of the content."""
    from pyarrow import compute

    classes: Counter[str] = Counter()
    lengths: list[Any] = [np.zeros(0, np.int32)]
    trainable = 0
    for batch in _batches(path):
        lengths.append(batch["input_ids"].value_lengths().to_numpy(zero_copy_only=False))
        labels = batch["labels"].flatten().to_numpy()
        firsts = compute.list_element(batch["labels"], 0).to_numpy()  # nothing predicts these
        trainable += int((labels != IGNORED).sum() - (firsts != IGNORED).sum())
        digest.update("\n".join(batch["row"].to_pylist()).encode())
        for values in (lengths[-1], batch["input_ids"].flatten().to_numpy(), labels):
            digest.update(np.ascontiguousarray(values).tobytes())
        asked = np.flatnonzero(batch["choices"].value_lengths().to_numpy(zero_copy_only=False))
        classes.update(batch["answer"].take(asked).to_pylist() if len(asked) else [])
    every = np.concatenate(lengths)
    every.sort()
    groups = facts.column("group_key")[facts.split == split]
    groups.sort()
    return {
        "rows": len(every),
        "groups": int(np.count_nonzero(groups[1:] != groups[:-1])) + bool(len(groups)),
        "classes": dict(sorted(classes.items())),
        "tokens": int(every.sum()),
        "trainable_tokens": trainable,
        "median_length": int(every[len(every) // 2]),
        "longest": int(every[-1]),
    }


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as handle, pa.ipc.open_stream(handle) as stream:
        yield from stream


def _first(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a split."""
    rows: list[dict[str, Any]] = []
    for batch in _batches(path):
        rows += batch.slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows
