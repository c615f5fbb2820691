"""A stack of expert matrices in 4 bits: one row of packed NF4 values per expert, and one fp32 maximum per 64 values.

0.5625 bytes per parameter (4 bits + 32/64 bits). bitsandbytes does the arithmetic; it packs matrices of `nn.Linear`
only, and transformers 5 keeps experts as 3-D parameters, so the stack is ours. (NF4: Dettmers et al. 2023,
arXiv:2305.14314.)

Shapes: E experts, O x I one expert's matrix as it is stored; packed (E, O*I/2) uint8; absmax (E, O*I/64) fp32.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

BLOCK = 64
"""Values that share one maximum."""

ABSMAX = "_absmax"
"""Suffix of the parameter that holds the maxima of a packed stack."""


def can_pack(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a (E, O, I) stack splits into whole blocks per expert."""
    return len(shape) == 3 and (shape[1] * shape[2]) % BLOCK == 0


def pack(stack_EOI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed (E, O*I/2) uint8, absmax (E, O*I/64) fp32) of a floating-point stack, quantised expert by expert.

    Raises ValueError when O*I is not a multiple of 64.
    """
    if not can_pack(stack_EOI.shape):
        raise ValueError(f"a stack of shape {tuple(stack_EOI.shape)} does not split into blocks of {BLOCK} per expert")
    num_experts, per_expert = stack_EOI.shape[0], stack_EOI.shape[1] * stack_EOI.shape[2]
    packed = torch.empty(num_experts, per_expert // 2, dtype=torch.uint8, device=stack_EOI.device)
    absmax = torch.empty(num_experts, per_expert // BLOCK, dtype=torch.float32, device=stack_EOI.device)
    for e in range(num_experts):
        values, state = quantize_4bit(stack_EOI[e].contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed[e], absmax[e] = values.view(-1), state.absmax
    return packed, absmax


def unpack_expert(
    packed_n: torch.Tensor, absmax_n: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The (O, I) matrix of one expert in `dtype`, from its row of packed values and its row of maxima."""
    rows, columns = shape
    # bitsandbytes' CPU kernel takes maxima row by row, so a row must be whole blocks.
    blocks = shape if columns % BLOCK == 0 else (rows * columns // BLOCK, BLOCK)
    state = QuantState(absmax=absmax_n, shape=torch.Size(blocks), dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed_n.view(-1, 1), state).view(rows, columns)
