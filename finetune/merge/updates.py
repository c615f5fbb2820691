"""An adapter as updates of the base's parameters, held as factors: no update is ever multiplied out as a whole.

W' = W + scale * B A, per expert of a stack; with DoRA every row of W' is brought to the length that was trained for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

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

    def squares(self) -> float:
        """The sum of squares of the update, from its factors: of L R it is that of (L^T L) * (R R^T)."""
        left, right = self.left_Or.double(), self.right_rI.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum()) * self.scale**2


@dataclass(slots=True)
class Update:
    """The update of one runtime parameter: a matrix, or a stack of one matrix per expert."""

    name: str
    """The parameter."""
    a: torch.Tensor
    """(rank, in), or (experts, rank, in)."""
    b: torch.Tensor
    """(out, rank), or (experts, out, rank)."""
    scale: float
    """The factor of the product."""
    transposed: bool = False
    """Matrices are stored as (in, out)."""
    lengths: torch.Tensor | None = None
    """With DoRA, what length every row of the sum has in the end."""
    parts: set[tuple[int | None, int]] = field(default_factory=set)
    """(expert, part) pairs that found their tensor; the expert is None where the checkpoint holds the whole stack."""
    expected: int = 1
    """How many pairs there must be in the end; known once the first key has shown the layout."""

    @property
    def experts(self) -> int:
        """Experts of the stack; 0 for a plain matrix."""
        return self.a.shape[0] if self.a.dim() == 3 else 0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of one matrix as it is stored."""
        outputs, inputs = self.b.shape[-2], self.a.shape[-1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def pair(self, expert: int | None, index: int = 0, count: int = 1) -> Pair:
        """The update of one matrix, or of one of the `count` parts of its rows that are tensors of their own."""
        b, a = (self.b, self.a) if expert is None else (self.b[expert], self.a[expert])
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        left, scale = left.chunk(count)[index].contiguous(), self.scale
        if math.frexp(scale)[0] == 0.5:  # a power of two: no difference to the bit, and a pass over the sums less
            left, scale = left * scale, 1.0
        return Pair(left, right.contiguous(), scale, self.lengths)


def read_updates(adapter: Path, names: Renamer) -> dict[str, Update]:
    """Parameter name -> its update, of a PEFT folder in any layout that `layouts` can read.

    Raises AdapterError (ADP-011 to ADP-016) or, when the base lacks a weight, WeightsError MRG-001.
    """
    file = read_adapter(adapter, adaptable(names.skeleton, names.family))
    updates = {}
    for update in file.updates:
        a, b = (file.tensors.pop(PREFIX + update.key + end).float() for end in (A, B))
        updates[update.parameter] = update_of(update.parameter, a, b, update.rank, update.scale, names)
        if file.config.use_dora:
            updates[update.parameter].lengths = file.tensors.pop(PREFIX + update.key + LENGTHS).float()
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
        return Update(name, a, b, scale)
    experts = shape[0]
    if a.shape[0] != rank * experts:
        raise foreign(f"{name}: lora_A has {a.shape[0]} rows, not {experts} experts x rank {rank}")
    a_ErN = a.reshape(experts, rank, -1)
    b_EMr = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    return Update(name, a_ErN, b_EMr, scale, names.is_transposed(name))


def foreign(what: str) -> WeightsError:
    """The error about an adapter that belongs to another base."""
    return WeightsError("MRG-001", what, "the adapter belongs to another base", "the base it was trained on")
