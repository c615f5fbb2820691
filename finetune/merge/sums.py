"""The arithmetic of a merge, one matrix at a time: sums in fp32, rounded once, and how much the rounding lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from finetune.merge.updates import New, Pair

VALUES = 2**18
"""Values of a matrix that are summed at a time: small enough for the processor's cache."""

SAMPLE = 16
"""One of so many rows tells what rounding takes: looking at all costs as much as the sums."""


class _Scratch(threading.local):
    """Two buffers of each thread: memory that is new for every matrix costs more than the sums in it."""

    def __init__(self) -> None:
        self.buffers = (torch.empty(0), torch.empty(0))

    def take(self, rows: int, columns: int) -> Iterator[torch.Tensor]:
        """The two, as matrices of this shape with any values."""
        if self.buffers[0].numel() < rows * columns:
            self.buffers = (torch.empty(rows * columns), torch.empty(rows * columns))
        return (buffer[: rows * columns].view(rows, columns) for buffer in self.buffers)


_SCRATCH = _Scratch()


@dataclass(slots=True)
class Tally:
    """Sums of squares over all values that were written."""

    update: float = 0.0
    """Of what the adapter adds."""
    rounding: float = 0.0
    """Of what the stored type could not hold of the sums."""
    four_bit: float = 0.0
    """Of the difference that packing into 4 bits makes, where the sums begin with that."""

    def add(self, other: Tally) -> None:
        """Adds the sums of another."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def lost(self) -> float:
        """Norm of the rounding over that of the update; 0 without an update."""
        return math.sqrt(self.rounding / self.update) if self.update else 0.0

    def distance(self) -> float:
        """Norm of what 4 bits changed over that of the update; 0 without an update."""
        return math.sqrt(self.four_bit / self.update) if self.update else 0.0


def add(base_OI: torch.Tensor, pair: Pair | New | None, out_OI: torch.Tensor, tally: Tally) -> None:
    """Writes base + update into `out`, which may be the base itself; sums are in fp32 and rounded once to its type.

    In fp32 every value is the sum of the matrix product, times the scale, and the base's value, in this order: as PEFT
    does it. What rounding takes of a matrix of several pieces is told from a sixteenth of its rows, spread over it.
    """
    if base_OI.dim() != 2:  # a vector, a convolution
        base_OI, out_OI = (tensor.view(len(tensor) if tensor.dim() > 2 else 1, -1) for tensor in (base_OI, out_OI))
    whole, columns = base_OI.shape
    rows = min(whole, max(1, VALUES // columns))
    if isinstance(pair, Pair):
        tally.update += pair.squares
    rounds = out_OI.dtype != torch.float32
    sum_ = _one_pass if rounds and isinstance(pair, Pair) and pair.lengths_O is None else _in_order
    every = SAMPLE if rows >= SAMPLE and whole > rows else 1
    exact_, spare_ = _SCRATCH.take(rows, columns)
    lost, seen = 0.0, 0
    for begin in range(0, whole, rows):
        part = slice(begin, min(begin + rows, whole))
        base, out = base_OI[part], out_OI[part]
        count = part.stop - begin
        exact, spare = (exact_, spare_) if count == rows else (exact_[:count], spare_[:count])
        sum_(base, pair, part, exact, spare, tally)
        out.copy_(exact)
        if rounds:
            told = out[every // 2 :: every]
            if (some := told.shape[0]) > 0:
                lost += squares(spare[:some].copy_(told).sub_(exact[every // 2 :: every]))
                seen += some
    if seen:
        tally.rounding += lost * (whole / seen)


def _one_pass(
    base: torch.Tensor, pair: Any, part: slice, exact: torch.Tensor, spare: torch.Tensor, tally: Tally
) -> None:
    """base + scale * left right, the sum taken within the product: what a 16-bit type holds of it is the same."""
    exact.copy_(base).addmm_(pair.left_Or[part], pair.right_rI, alpha=pair.scale)


def _in_order(
    base: torch.Tensor, pair: Pair | New | None, part: slice, exact: torch.Tensor, spare: torch.Tensor, tally: Tally
) -> None:
    """The sum of some rows in `exact`, by one operation after the other; `spare` has any values afterwards."""
    plain = spare.copy_(base)  # a sum of two types is slower than this and a sum of one
    if pair is None:
        exact.copy_(plain)
    elif isinstance(pair, New):
        exact.copy_(pair.values.view(-1, base.shape[1])[part])
        tally.update += squares(exact - plain)
    else:
        torch.mm(pair.left_Or[part], pair.right_rI, out=exact)
        if pair.scale != 1:
            exact *= pair.scale
        exact += plain
        if pair.lengths_O is not None:
            exact *= (pair.lengths_O[part] / exact.norm(dim=1))[:, None]
            tally.update += squares(exact - plain)


def squares(values: torch.Tensor) -> float:
    """The sum of squares of a contiguous tensor."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
