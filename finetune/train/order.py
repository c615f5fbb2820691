"""The order of rows in each epoch, which depends on the seed and the epoch alone: `Order`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(Sampler[int]):
    """Row numbers in a random order; with `lengths`, rows of like length stand together in runs of `together`.

    transformers' samplers draw from a generator that has moved on when a run resumes within an epoch, and then skip
    other rows than were read (5.17.0, `group_by_length`).
    """

    def __init__(self, rows: int, seed: int, lengths: Sequence[int] | None = None, together: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.together = rows, seed, lengths, together
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.lengths is None:
            order: list[int] = torch.randperm(self.rows, generator=drawn).tolist()
            return iter(order)
        grouped: list[Any] = get_length_grouped_indices(self.lengths, self.together, generator=drawn)
        return iter(grouped)
