"""The arithmetic of a grouped projection: y = x W_e + scale (x L_e) R_e, and what its backward pass needs.

Two ways of the same thing. `Loop` is for a CPU: expert by expert, only those with tokens are unpacked. `Grouped` is for
a GPU: the whole stack is unpacked once into a shared buffer and `grouped_mm` works on offsets that stay on the device;
where few rows meet an expert, a fused kernel reads the 4-bit values itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from bitsandbytes.functional import has_avx512bf16
from torch.nn import functional as F

from finetune.experts import fused
from finetune.experts.routing import Routing
from finetune.experts.scratch import SCRATCH
from finetune.experts.stack import expert_weight, layout_of, width

ALIGNMENT = 16
"""Bytes: `grouped_mm` wants the rows of every matrix to begin at a multiple of this."""


class Products(Protocol):
    """One projection of sorted rows with a module's stack. Everything is in one type, that of `arithmetic`.

    What a product leaves in rows of no expert is undefined.
    """

    def frozen(self, x_PN: torch.Tensor) -> torch.Tensor:
        """y_PM = x_PN W_e."""

    def frozen_back(self, grad_PM: torch.Tensor) -> torch.Tensor:
        """grad_PN = grad_PM W_e^T."""

    def times(self, x_PN: torch.Tensor, factor_ENM: torch.Tensor) -> torch.Tensor:
        """x_PN factor_e."""

    def add(self, y_PM: torch.Tensor, x_PN: torch.Tensor, factor_ENM: torch.Tensor, scale: float) -> None:
        """y_PM += scale * x_PN factor_e, in place."""

    def outer(self, x_PN: torch.Tensor, grad_PM: torch.Tensor) -> torch.Tensor:
        """(E, N, M): for each expert the sum over its rows of x^T grad; zero for an expert without rows."""


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has matrix instructions for bf16; without them fp32 products are several times faster."""
    return bool(has_avx512bf16())


def arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which matrices are multiplied for a model in `dtype`."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_multiplies_bf16():
        return torch.float32
    return dtype


@dataclass(frozen=True, slots=True)
class Loop:
    """Expert by expert, for a CPU."""

    module: Any
    """The experts module."""
    name: str
    """Its stack."""
    groups: list[tuple[int, int, int]]
    """(expert, first row, end row)."""

    def frozen(self, x_PN: torch.Tensor) -> torch.Tensor:
        """Every group times its expert, unpacked for it alone."""
        y_PM = x_PN.new_empty(x_PN.shape[0], width(self.module, self.name))
        for e, start, end in self.groups:
            torch.mm(x_PN[start:end], expert_weight(self.module, self.name, e, x_PN.dtype), out=y_PM[start:end])
        return y_PM

    def frozen_back(self, grad_PM: torch.Tensor) -> torch.Tensor:
        """The same with the transposed weights."""
        grad_PN = grad_PM.new_empty(grad_PM.shape[0], width(self.module, self.name, back=True))
        for e, start, end in self.groups:
            weight_MN = expert_weight(self.module, self.name, e, grad_PM.dtype).T
            torch.mm(grad_PM[start:end], weight_MN, out=grad_PN[start:end])
        return grad_PN

    def times(self, x_PN: torch.Tensor, factor_ENM: torch.Tensor) -> torch.Tensor:
        """Every group times its factor."""
        y_PM = x_PN.new_empty(x_PN.shape[0], factor_ENM.shape[2])
        for e, start, end in self.groups:
            torch.mm(x_PN[start:end], factor_ENM[e], out=y_PM[start:end])
        return y_PM

    def add(self, y_PM: torch.Tensor, x_PN: torch.Tensor, factor_ENM: torch.Tensor, scale: float) -> None:
        """Every group times its factor, added in place."""
        for e, start, end in self.groups:
            y_PM[start:end].addmm_(x_PN[start:end], factor_ENM[e], alpha=scale)

    def outer(self, x_PN: torch.Tensor, grad_PM: torch.Tensor) -> torch.Tensor:
        """One product per group."""
        experts = layout_of(self.module).shapes[self.name][0]
        found = x_PN.new_empty(experts, x_PN.shape[1], grad_PM.shape[1])
        for e, start, end in self.groups:
            torch.mm(x_PN[start:end].T, grad_PM[start:end], out=found[e])
        if len(self.groups) < experts:
            found[sorted(set(range(experts)) - {e for e, _, _ in self.groups})] = 0
        return found


@dataclass(frozen=True, slots=True)
class Grouped:
    """All experts in one product, for a GPU. Rows past the last offset come out undefined."""

    module: Any
    """The experts module."""
    name: str
    """Its stack."""
    offsets_E: torch.Tensor
    """int32 end row of every expert."""

    def frozen(self, x_PN: torch.Tensor) -> torch.Tensor:
        """The whole stack unpacked, or read in 4 bits by the fused kernel where rows are few."""
        if self._is_sparse(x_PN):
            return fused.product(x_PN, self.module, self.name, self.offsets_E, back=False)
        stack = SCRATCH.stack(self.module, self.name, x_PN.dtype)
        return grouped_mm(x_PN, stack if layout_of(self.module).transposed else stack.mT, self.offsets_E)

    def frozen_back(self, grad_PM: torch.Tensor) -> torch.Tensor:
        """The same with the transposed weights."""
        if self._is_sparse(grad_PM):
            return fused.product(grad_PM, self.module, self.name, self.offsets_E, back=True)
        stack = SCRATCH.stack(self.module, self.name, grad_PM.dtype)
        return grouped_mm(grad_PM, stack.mT if layout_of(self.module).transposed else stack, self.offsets_E)

    def times(self, x_PN: torch.Tensor, factor_ENM: torch.Tensor) -> torch.Tensor:
        """One grouped product."""
        return grouped_mm(x_PN, factor_ENM, self.offsets_E)

    def add(self, y_PM: torch.Tensor, x_PN: torch.Tensor, factor_ENM: torch.Tensor, scale: float) -> None:
        """One grouped product, added."""
        y_PM.add_(grouped_mm(x_PN, factor_ENM, self.offsets_E), alpha=scale)

    def outer(self, x_PN: torch.Tensor, grad_PM: torch.Tensor) -> torch.Tensor:
        """One grouped product over the rows."""
        return grouped_mm(x_PN.T, grad_PM.contiguous(), self.offsets_E)

    def _is_sparse(self, rows: torch.Tensor) -> bool:
        """Whether so few rows meet an expert that unpacking whole stacks would cost more than the products."""
        few = rows.shape[0] < fused.ROWS_PER_EXPERT * self.offsets_E.numel()
        return few and fused.can_read(self.module, self.name) and fused.works(rows.device, rows.dtype)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """torch's grouped product, after it has been seen to be right on this device. Raises RuntimeError otherwise."""
    if not grouped_mm_is_right(a.device, a.dtype):
        raise RuntimeError(f"torch {torch.__version__} multiplies groups wrongly on {a.device} (pytorch#186365)")
    return F.grouped_mm(a, b, offs=offsets_E)


@functools.cache
def grouped_mm_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compares grouped products with plain ones once per process.

    pytorch#186365: alternating wrong results with a transposed view after a broadcast, seen on a development build.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=generator).to(device, dtype)
    w = (torch.randn(3, 32, 64, generator=generator).to(device, dtype) * torch.ones(3, 1, 1, device=device)).to(dtype)
    offsets, ends = torch.tensor([16, 16, 48], dtype=torch.int32, device=device), (0, 16, 16, 48)
    for _ in range(4):
        y = F.grouped_mm(x, w.mT, offs=offsets)
        outer = F.grouped_mm(x.T, y.contiguous(), offs=offsets)
        for e in range(3):
            rows = slice(ends[e], ends[e + 1])
            near = {"rtol": 2e-2, "atol": 2e-2 * 64**0.5}
            if not torch.allclose(y[rows].float(), x[rows].float() @ w[e].float().T, **near):
                return False
            if not torch.allclose(outer[e].float(), x[rows].float().T @ y[rows].float(), rtol=2e-2, atol=16.0):
                return False
    return True


def aligned_rank(rank: int, dtype: torch.dtype) -> int:
    """The rank filled up so that a row of it is a multiple of 16 bytes."""
    step = ALIGNMENT // dtype.itemsize
    return -(-rank // step) * step


def products(module: Any, name: str, routing: Routing) -> Products:
    """The arithmetic for a plan."""
    if routing.groups is not None:
        return Loop(module, name, routing.groups)
    if routing.offsets_E is None:
        raise ValueError("a plan without groups and offsets")
    return Grouped(module, name, routing.offsets_E)
