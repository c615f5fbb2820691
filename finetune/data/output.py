"""What the data stage leaves in the run folder: two tokenised splits, the ledger, the mask to look at, the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.data.rows import Row, listed
from finetune.data.split import in_order
from finetune.data.tokens import Tokens, marked, tokenize
from finetune.errors import DataError
from finetune.recipe import Data
from finetune.rundir import write_json, write_text

SPLITS = ("train", "heldout")


@dataclass(slots=True, kw_only=True)
class Gathered:
    """The rows of a recipe with their splits, and where they are from."""

    rows: list[Row]
    """Every row that came in, kept or dropped."""
    source: dict[str, Any]
    """Title, licence, attribution and hashes of the files, as report.json shows them."""
    drop_long: bool
    """Rows longer than `data.max_length` are dropped instead of ending the run."""


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


def _report(
    gathered: Gathered, data: Data, tokenizer: Any, splits: dict[str, list[Row]], tokens: dict[str, Tokens]
) -> Any:
    import tokenizers
    import transformers

    versions = {"finetune": __version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    report: dict[str, Any] = {
        "source": gathered.source,
        "rows_read": sum(row.part == 1 for row in gathered.rows),
        "further_excerpts": sum(row.part > 1 for row in gathered.rows),
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


def _progress(rows: list[Row], title: str) -> Iterable[Row]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title} {len(rows)} rows", file=sys.stderr, flush=True)
        return rows
    return track(rows, title, console=console, transient=True)
