"""An adapter as updates of the base's parameters, held as factors: no update is ever multiplied out as a whole.

W' = W + scale * B A, per expert of a stack; with DoRA every row of W' is brought to the length that was trained for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune import whole
from finetune.errors import WeightsError
from finetune.layouts import LENGTHS, PREFIX, A, B, adaptable, read_adapter
from finetune.merge.names import Renamer


@dataclass(frozen=True, slots=True)
class Pair:
    """The update of one matrix as it is stored: `scale` * left @ right."""

    left_Or: torch.Tensor
    """(rows, rank)."""
    right_rI: torch.Tensor
    """(rank, columns)."""
    scale: float
    """The factor of the product."""
    lengths_O: torch.Tensor | None
    """With DoRA, what length every row of the sum has in the end."""
    squares: float
    """The sum of squares of the update; 0 with DoRA, where the base is needed to tell."""


@dataclass(frozen=True, slots=True)
class New:
    """A trained weight itself, in the place of the base's."""

    values: torch.Tensor
    """As it is stored, in fp32."""


@dataclass(slots=True)
class Update:
    """The update of one runtime parameter: a matrix, or a stack of one matrix per expert."""

    name: str
    """The parameter."""
    left: torch.Tensor
    """(rows, rank) of a matrix as it is stored, or (experts, rows, rank)."""
    right: torch.Tensor
    """(rank, columns), or (experts, rank, columns)."""
    scale: float
    """The factor of the product."""
    lengths: torch.Tensor | None = None
    """With DoRA, what length every row of the sum has in the end."""
    parts: set[tuple[int | None, int]] = field(default_factory=set)
    """(expert, part) pairs that found their tensor; the expert is None where the checkpoint holds the whole stack."""
    expected: int = 1
    """How many pairs there must be in the end; known once the first key has shown the layout."""
    _squares: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """(part, of how many) -> the sum of squares of each expert's update."""

    @property
    def experts(self) -> int:
        """Experts of the stack; 0 for a plain matrix."""
        return self.left.shape[0] if self.left.dim() == 3 else 0

    def stored(self, expert: int | None, count: int) -> tuple[int, ...]:
        """Shape of a tensor that holds one of `count` parts of an expert's matrix, or (None) all of the parameter."""
        rows, columns = self.left.shape[-2], self.right.shape[-1]
        if rows % count:
            return ()
        return (rows // count, columns) if expert is not None or not self.experts else (self.experts, rows, columns)

    def pair(self, expert: int | None, index: int = 0, count: int = 1) -> Pair:
        """The update of one matrix, or of one of the `count` parts of its rows that are tensors of their own."""
        left, right = (self.left, self.right) if expert is None else (self.left[expert], self.right[expert])
        left, scale = left if count == 1 else left.chunk(count)[index], self.scale
        if math.frexp(scale)[0] == 0.5:  # a power of two: no difference to the bit, and a pass over the sums less
            left, scale = left * scale, 1.0
        squares = self._squares_of(index, count)[expert or 0]
        return Pair(left.contiguous(), right.contiguous(), scale, self.lengths, squares)

    def _squares_of(self, index: int, count: int) -> list[float]:
        """Sums of squares from the factors, for all experts at once: of L R it is the sum of (L^T L) * (R R^T)."""
        if self.lengths is not None:
            return [0.0] * max(1, self.experts)
        if (index, count) not in self._squares:  # threads that come at the same time find the same
            left, right = self.left.chunk(count, dim=-2)[index], self.right
            each = ((left.mT @ left).double() * (right @ right.mT)).sum((-2, -1)) * self.scale**2
            self._squares[index, count] = each.reshape(-1).tolist()
        return self._squares[index, count]


@dataclass(slots=True)
class Replacement:
    """A runtime parameter that full fine-tuning has trained."""

    name: str
    """The parameter."""
    read: Callable[[int | None], torch.Tensor]
    """Its values in fp32: of one expert, or (None) all."""
    whole: tuple[int, ...]
    """Its shape."""
    experts: int
    """Experts of the stack; 0 for any other parameter."""
    lengths: None = None
    """Only updates have them."""
    parts: set[tuple[int | None, int]] = field(default_factory=set)
    """As those of an update."""
    expected: int = 1
    """As that of an update."""

    def stored(self, expert: int | None, count: int) -> tuple[int, ...]:
        """Shape of a tensor that holds one of `count` parts of an expert's matrix, or (None) all of the parameter."""
        shape = self.whole if expert is None else self.whole[1:]
        return () if count > 1 and shape[0] % count else (shape[0] // count, *shape[1:])

    def pair(self, expert: int | None, index: int = 0, count: int = 1) -> New:
        """One matrix, or one of the `count` parts of its rows."""
        values = self.read(expert).float()
        return New(values if count == 1 else values.chunk(count)[index])


def read_updates(adapter: Path, names: Renamer) -> dict[str, Update | Replacement]:
    """Parameter name -> its update, of a PEFT folder in any layout that `layouts` can read, or of trained weights.

    Raises AdapterError (ADP-011 to ADP-018) or, when the base lacks a weight, WeightsError MRG-001.
    """
    if whole.is_tuned(adapter):
        return {name: replacement(name, read, names) for name, read in whole.read(adapter).items()}
    file = read_adapter(adapter, adaptable(names.skeleton, names.family))
    updates: dict[str, Update | Replacement] = {}
    for update in file.updates:
        a, b = (file.tensors.pop(PREFIX + update.key + end).float() for end in (A, B))
        made = update_of(update.parameter, a, b, update.rank, update.scale, names)
        if file.config.use_dora:
            made.lengths = file.tensors.pop(PREFIX + update.key + LENGTHS).float()
        updates[update.parameter] = made
    if file.tensors:
        what = f"{len(file.tensors)} tensors of {adapter} belong to no update, e.g. {next(iter(file.tensors))}"
        raise WeightsError("MRG-001", what, "nothing of an adapter may be left out", "the adapter as PEFT saved it")
    return updates


def update_of(name: str, a: torch.Tensor, b: torch.Tensor, rank: int, scale: float, names: Renamer) -> Update:
    """The update of parameter `name` from its LoRA matrices as PEFT stores them. Raises WeightsError MRG-001.

    PEFT takes a stack (E, d1, d2) as (E, out, in) unless its module says `is_transposed`; the update is B A or (B A)^T.
    """
    if name not in names.state:
        raise foreign(f"the base has no weight {name}")
    shape = names.state[name].shape
    if len(shape) == 2:
        return Update(name, b, a, scale)
    experts = shape[0]
    if a.shape[0] != rank * experts:
        raise foreign(f"{name}: lora_A has {a.shape[0]} rows, not {experts} experts x rank {rank}")
    a_ErN = a.reshape(experts, rank, -1)
    b_EMr = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    left, right = (a_ErN.mT, b_EMr.mT) if names.is_transposed(name) else (b_EMr, a_ErN)
    return Update(name, left, right, scale)


def replacement(name: str, read: Callable[[int | None], torch.Tensor], names: Renamer) -> Replacement:
    """The trained weight `name` in place of the base's. Raises WeightsError MRG-001."""
    if name not in names.state:
        raise foreign(f"the base has no weight {name}")
    shape = tuple(names.state[name].shape)
    stacked = bool(names.family.experts) and name.rpartition(".")[0].endswith("." + names.family.experts)
    return Replacement(name, read, shape, shape[0] if stacked and len(shape) == 3 else 0)


def foreign(what: str) -> WeightsError:
    """The error about an adapter that belongs to another base."""
    return WeightsError("MRG-001", what, "the adapter belongs to another base", "the base it was trained on")
