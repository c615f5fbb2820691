"""Number formats of published checkpoints in plain numbers: fp8 and fp4 values with the scales that belong to them.

A scale multiplies the block of values it stands for. Its grid says how large the blocks are; the last block of a row or
a column may be shorter. Nothing here knows files or models.
"""

from __future__ import annotations

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Eight-bit floating-point types of weights."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each four-bit code (OCP Microscaling Formats v1.0, 5.3.3): a sign bit, two of exponent, one of mantissa."""


def plain_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale in fp32. Bytes are exponents with a bias of 127 (E8M0); every other type says its value itself."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale.float()


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes -> (..., 2n) fp32 values; the low four bits come first."""
    codes = packed.contiguous().view(torch.uint8)
    table = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)
    pairs = torch.stack([codes & 0xF, codes >> 4], dim=-1)
    return table[pairs.flatten(-2).int()]


def block_length(size: int, blocks: int, declared: int | None) -> int:
    """How many values share one scale along an axis of `size` values and `blocks` scales.

    `declared` is what the config says, which alone explains a last block that is shorter. Raises ValueError when
    neither it nor an even split fits.
    """
    if blocks == 1:
        return size
    if declared and -(-size // declared) == blocks:
        return declared
    if size % blocks == 0:
        return size // blocks
    raise ValueError(f"{blocks} scales do not fit {size} values (block length {declared or 'not stated'})")


def scaled(values_OI: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """(O, I) fp32: each value times the scale of its block.

    `scale` is a number, one per row (O), or a grid (rows of blocks, columns of blocks). Raises ValueError when it does
    not fit.
    """
    rows, columns = values_OI.shape
    scale = plain_scale(scale)
    if scale.numel() == 1:
        return values_OI.float() * scale.reshape(())
    if scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if scale.dim() != 2:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} for a matrix of shape {(rows, columns)}")
    declared = block or (None, None)
    height = block_length(rows, scale.shape[0], declared[0])
    width = block_length(columns, scale.shape[1], declared[1])
    wide = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return values_OI.float() * wide


def mxfp4(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """(O, G * 2B) fp32 of a matrix in MXFP4: G groups per row, each of 2B four-bit values and one exponent."""
    values = unpack_e2m1(blocks_OGB) * plain_scale(scales_OG).unsqueeze(-1)
    return values.flatten(1)
