"""Batches that say which rows they are of: `Numbered(collate)`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.tokens import IGNORED
from finetune.errors import NumbersError

NUMBER, DIGEST = "row_number", "row_digest"
"""Names beside the model's own inputs; they are taken out before the forward pass."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A collator that adds the numbers of the rows, and a digest of what the model is given."""

    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    """Makes a batch of rows."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch with `row_number` (rows,) and `row_digest` (4,), both int64.

        Raises NumbersError (TRN-006) when no token of it is trained: its loss would be 0 / 0.
        """
        numbers = torch.tensor([row[NUMBER] for row in rows])
        batch = self.collate([{name: value for name, value in row.items() if name != NUMBER} for row in rows])
        if not bool((batch["labels"][..., 1:] != IGNORED).any()):
            raise NumbersError(
                "TRN-006",
                f"a batch has no trained token: rows {numbers.tolist()[:8]}",
                "its loss would not be a number",
                "the data stage again in a new run",
            )
        return dict(batch) | {NUMBER: numbers, DIGEST: digest(batch)}


def digest(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """sha256 of names, shapes and values of a batch, as four int64."""
    found = hashlib.sha256()
    for name in sorted(batch):
        tensor = batch[name].contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.int64).clone()


def hex_of(digests: Sequence[Sequence[int]]) -> str:
    """One digest of several, as 16 hex digits: of an update's batches, by rank and pass."""
    found = hashlib.sha256(b"".join(int(n).to_bytes(8, "little", signed=True) for one in digests for n in one))
    return found.hexdigest()[:16]
