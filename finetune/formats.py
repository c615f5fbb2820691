"""Number formats of published checkpoints in plain numbers: fp8 and fp4 values with the scales that belong to them.

A scale multiplies the block of values it stands for. Its grid says how large the blocks are; the last block of a row or
a column may be shorter. Nothing here knows files or models.
"""

from __future__ import annotations

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Eight-bit floating-point types of weights."""

EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
"""Types of scales that are powers of two, stored as an exponent with a bias of 127."""

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


def to_fp8(
    values_OI: torch.Tensor, old: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in the fp8 type `dtype`, new scales) of a fp32 matrix: what `scaled` turns back, each rounded once.

    The new scales have shape and type of the `old` ones and make the largest value of a block the largest of the type;
    in E8M0 the next power of two above. A block of zeros keeps its old scale. Raises ValueError as `scaled` does.
    """
    rows, columns = values_OI.shape
    grid = old.reshape(1, 1) if old.numel() == 1 else old.unsqueeze(1) if old.dim() == 1 else old
    declared = block or (None, None)
    height = block_length(rows, grid.shape[0], declared[0])
    width = block_length(columns, grid.shape[1], declared[1])
    below, right = grid.shape[0] * height - rows, grid.shape[1] * width - columns
    padded = torch.nn.functional.pad(values_OI, (0, right, 0, below)) if below or right else values_OI
    largest = padded.view(grid.shape[0], height, grid.shape[1], width).abs().amax((1, 3))
    limit = torch.finfo(dtype).max
    scale = torch.where(largest > 0, _stored_scale(largest / limit, old.dtype), plain_scale(grid))
    wide = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    values = (values_OI / wide).clamp_(-limit, limit).to(dtype)
    return values, _as_scale(scale, old.dtype).reshape(old.shape)


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The fp32 value, not below `scale`, that a scale stored as `dtype` will have."""
    if dtype in EXPONENTS:
        fraction, exponent = torch.frexp(scale)  # scale = fraction * 2^exponent, fraction in [0.5, 1)
        return torch.exp2((exponent - (fraction == 0.5).int()).clamp(-127, 127).float())
    if dtype == torch.float32:
        return scale
    return (scale * (1 + torch.finfo(dtype).eps)).to(dtype).float()


def _as_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype in EXPONENTS:
        return (torch.log2(scale).round() + 127).to(torch.uint8).view(dtype)
    return scale.to(dtype)


def mxfp4(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """(O, G * 2B) fp32 of a matrix in MXFP4: G groups per row, each of 2B four-bit values and one exponent."""
    values = unpack_e2m1(blocks_OGB) * plain_scale(scales_OG).unsqueeze(-1)
    return values.flatten(1)
