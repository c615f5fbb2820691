"""Several rows in one sequence: packed best fit first, each with positions of its own, so that none sees another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.tokens import IGNORED

TOGETHER = 10_000
"""Rows that are packed with each other; memory is theirs."""


def pack(source: Path, target: Path, length: int) -> dict[str, Any]:
    """Writes the rows of a split as sequences of at most `length` tokens; what came of it, for the report.

    Columns: input_ids, labels, position_ids (from 0 in every row). Rows are placed by TRL's best-fit decreasing:
    longest first, each into the fullest sequence that has room for it; none is cut.
    """
    from trl import pack_dataset

    from finetune.data.output import dataset

    rows = dataset(source).select_columns(["input_ids", "labels"])
    halfway = target.with_suffix(".unnumbered")
    packed = pack_dataset(rows, length, "bfd", {"batch_size": TOGETHER, "cache_file_name": str(halfway)})
    made = packed.map(
        lambda row: {"position_ids": [i for size in row["seq_lengths"] for i in range(size)]},
        remove_columns=["seq_lengths"],
        cache_file_name=str(target),
        new_fingerprint="packed",  # it is written into the file, and would be drawn at random
    )
    halfway.unlink()
    tokens = sum(map(len, made["input_ids"]))
    return {"sequences": len(made), "rows": len(rows), "filled": round(tokens / (len(made) * length), 4)}


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Makes a batch of packed sequences. There is no attention mask: positions that begin anew part the rows.

    Padding begins anew too, so it is a row of its own that nobody learns from (transformers 5.17, masking_utils).
    """

    pad: int
    """Id of the padding token."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """input_ids, labels and position_ids, each (rows, longest)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": [self.pad] * longest, "labels": [IGNORED] * longest, "position_ids": list(range(longest))}
        return {
            name: torch.tensor([list(row[name]) + rest[: longest - len(row[name])] for row in rows])
            for name, rest in fill.items()
        }
