"""The Triton kernel behind `fused`. Imported only where Triton is."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type

STEP = 64
"""Columns read at a time: one maximum per row and step."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton 3.9's interpreter multiplies bf16 bits as if they were integers: there the products are in fp32."""


def multiply(
    x_PN: torch.Tensor,
    packed: torch.Tensor,
    maxima: torch.Tensor,
    y_PM: torch.Tensor,
    offsets_E: torch.Tensor,
    expert_B: torch.Tensor,
    first_B: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    over_columns: bool,
    tile: tuple[int, int],
) -> None:
    """y = x W_e^T summed over the columns of W (E, rows, columns), or x W_e summed over its rows.

    Columns are a multiple of 64. Writes `y_PM`; rows past the last offset stay as they are.
    """
    experts, rows, columns = shape
    if columns % STEP:
        raise ValueError(f"{columns} columns are not a multiple of {STEP}")
    code = get_4bit_type("nf4", device=x_PN.device)
    outputs = rows if over_columns else columns
    width = tile[1] if over_columns else STEP
    grid = (expert_B.numel(), triton.cdiv(outputs, width))
    kernel: Any = _over_columns if over_columns else _over_rows
    kernel[grid](
        x_PN, packed, maxima, code, y_PM, offsets_E, expert_B, first_B, experts, rows, columns,
        TILE_P=tile[0], TILE_R=tile[1], STEP=STEP, WIDE=x_PN.dtype == torch.float32 or INTERPRETED,
    )  # fmt: skip


@triton.jit
def _weights(packed, maxima, code, expert, rows_R, columns, rows, first_column, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(R, STEP) fp32 values of rows `rows_R` of one expert, from `first_column` on; rows past the last are zero."""
    half = first_column // 2 + tl.arange(0, STEP // 2)
    inside = rows_R < rows
    row_base = (expert.to(tl.int64) * rows + rows_R) * columns
    bytes_RH = tl.load(packed + (row_base // 2)[:, None] + half[None, :], mask=inside[:, None], other=0)
    high = tl.load(code + (bytes_RH >> 4).to(tl.int32))  # bitsandbytes puts the first of two values into the high bits
    low = tl.load(code + (bytes_RH & 0xF).to(tl.int32))
    largest_R = tl.load(maxima + (row_base + first_column) // STEP, mask=inside, other=0.0)
    return tl.interleave(high, low) * largest_R[:, None]


@triton.jit
def _over_columns(  # type: ignore[no-untyped-def]
    x, packed, maxima, code, y, offsets, experts_of_blocks, firsts, experts, rows, columns,
    TILE_P: tl.constexpr, TILE_R: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert = tl.load(experts_of_blocks + block)
    if expert < experts:
        end = tl.load(offsets + expert)
        p = tl.load(firsts + block) + tl.arange(0, TILE_P)
        r = tl.program_id(1) * TILE_R + tl.arange(0, TILE_R)
        total = tl.zeros((TILE_P, TILE_R), dtype=tl.float32)
        for first in range(0, columns, STEP):
            c = first + tl.arange(0, STEP)
            x_PC = tl.load(x + p.to(tl.int64)[:, None] * columns + c[None, :], mask=(p < end)[:, None], other=0.0)
            w_RC = _weights(packed, maxima, code, expert, r, columns, rows, first, STEP)
            if WIDE:
                total += tl.dot(x_PC.to(tl.float32), tl.trans(w_RC), input_precision="ieee")
            else:
                total += tl.dot(x_PC, tl.trans(w_RC.to(x_PC.dtype)))
        where = (p < end)[:, None] & (r < rows)[None, :]
        tl.store(y + p.to(tl.int64)[:, None] * rows + r[None, :], total.to(y.dtype.element_ty), mask=where)


@triton.jit
def _over_rows(  # type: ignore[no-untyped-def]
    x, packed, maxima, code, y, offsets, experts_of_blocks, firsts, experts, rows, columns,
    TILE_P: tl.constexpr, TILE_R: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert = tl.load(experts_of_blocks + block)
    if expert < experts:
        end = tl.load(offsets + expert)
        p = tl.load(firsts + block) + tl.arange(0, TILE_P)
        first = tl.program_id(1) * STEP
        total = tl.zeros((TILE_P, STEP), dtype=tl.float32)
        for first_row in range(0, rows, TILE_R):
            r = first_row + tl.arange(0, TILE_R)
            inside = (p < end)[:, None] & (r < rows)[None, :]
            x_PR = tl.load(x + p.to(tl.int64)[:, None] * rows + r[None, :], mask=inside, other=0.0)
            w_RC = _weights(packed, maxima, code, expert, r, columns, rows, first, STEP)
            if WIDE:
                total += tl.dot(x_PR.to(tl.float32), w_RC, input_precision="ieee")
            else:
                total += tl.dot(x_PR, w_RC.to(x_PR.dtype))
        c = first + tl.arange(0, STEP)
        where = (p < end)[:, None]
        tl.store(y + p.to(tl.int64)[:, None] * columns + c[None, :], total.to(y.dtype.element_ty), mask=where)
