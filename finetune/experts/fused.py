"""A grouped product that reads NF4 values itself: for a GPU, where few rows meet an expert.

Unpacking a stack moves 0.5625 + 2 + 2 bytes per parameter through memory (read packed, write, read again) whatever the
number of rows; this kernel moves 0.5625. With many rows per expert the plain way is faster, because it unpacks every
value once instead of once per block of rows. Triton is a part of torch's builds for GPUs; without it the plain way is
taken everywhere.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from finetune.experts import nf4
from finetune.experts.stack import is_packed, layout_of

ROWS_PER_EXPERT = 64
"""Below this many rows per expert the kernel is used. From a model of memory traffic, not measured yet."""

TILE_ROWS = 32
TILE_OUT = 64


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can run here: on a GPU in bf16 or fp16; anywhere under Triton's interpreter, which is slow."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def can_read(module: Any, name: str) -> bool:
    """Whether the kernel reads this stack: packed, its rows whole blocks."""
    return is_packed(module, name) and layout_of(module).shapes[name][2] % nf4.BLOCK == 0


def product(x_PN: torch.Tensor, module: Any, name: str, offsets_E: torch.Tensor, *, back: bool) -> torch.Tensor:
    """x_PN W_e of the packed stack `name`, or with `back` x_PN W_e^T, for rows sorted by expert.

    `offsets_E` are int32 end rows; rows past the last one come out undefined. Accumulates in fp32.
    """
    from finetune.experts.kernels import multiply

    layout = layout_of(module)
    experts, rows, columns = layout.shapes[name]
    over_columns = layout.transposed == back  # (E, out, in): forward sums over columns, backward over rows
    out = rows if over_columns else columns
    y_PM = torch.empty(x_PN.shape[0], out, dtype=x_PN.dtype, device=x_PN.device)
    expert_B, first_B = blocks_of(offsets_E, x_PN.shape[0])
    multiply(
        x_PN.contiguous(),
        getattr(module, name),
        nf4.maxima(module, name),
        y_PM,
        offsets_E,
        expert_B,
        first_B,
        shape=(experts, rows, columns),
        over_columns=over_columns,
        tile=(TILE_ROWS, TILE_OUT),
    )
    return y_PM


def blocks_of(offsets_E: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert, first row) of every block of `TILE_ROWS` rows, without a number leaving the device.

    There are as many as there can be at most; those that are not needed name the expert E.
    """
    experts = offsets_E.numel()
    starts_E = torch.cat([offsets_E.new_zeros(1), offsets_E[:-1]])
    tiles_E = (offsets_E - starts_E + TILE_ROWS - 1) // TILE_ROWS
    ends_E = tiles_E.cumsum(0).to(torch.int32)
    block_B = torch.arange(rows // TILE_ROWS + experts, dtype=torch.int32, device=offsets_E.device)
    expert_B = torch.searchsorted(ends_E, block_B, right=True).to(torch.int32)
    known = expert_B.clamp(max=experts - 1).long()
    first_B = starts_E[known] + (block_B - (ends_E - tiles_E)[known]) * TILE_ROWS
    return expert_B, first_B.to(torch.int32)
