"""A stack of expert matrices in 4 bits: one row of packed NF4 values per expert, and one maximum per 64 values.

0.5625 bytes per parameter with fp32 maxima (4 bits + 32/64 bits); 0.516 with double quantisation, which stores the
maxima in 8 bits around their mean, in blocks of 256. bitsandbytes does the arithmetic; it packs matrices of `nn.Linear`
only, and transformers 5 keeps experts as 3-D parameters, so the stack is ours. (NF4 and double quantisation: Dettmers
et al. 2023, arXiv:2305.14314.)

Shapes: E experts, O x I one expert's matrix as it is stored; packed (E, O*I/2) uint8; maxima (E, O*I/64) fp32, or
uint8 with scales (E, ceil(O*I/64/256)) and offsets (E,), both fp32. Everything is a parameter of its own, so that it
is saved, moved and sharded like any other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)

BLOCK = 64
"""Values that share one maximum."""

MAXIMA_BLOCK = 256
"""Maxima that share one scale under double quantisation."""

PIECE = 2**18
"""Values that are quantised at a time on a CPU; whole blocks."""

ABSMAX = "_absmax"
"""Suffix of the parameter that holds the maxima of a packed stack."""

SCALE, OFFSET = "_absmax_scale", "_absmax_offset"
"""Suffixes of what double quantisation adds: a scale per 256 maxima, and the mean of an expert's maxima."""

SUFFIXES = (ABSMAX, SCALE, OFFSET)


def can_pack(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a (E, O, I) stack splits into whole blocks per expert."""
    return len(shape) == 3 and (shape[1] * shape[2]) % BLOCK == 0


def bytes_per_parameter(double: bool = False) -> float:
    """Bytes in memory per parameter of a packed stack."""
    return 0.5 + (1 + 4 / MAXIMA_BLOCK if double else 4) / BLOCK


def placeholders(shape: tuple[int, int, int], double: bool = False) -> dict[str, torch.Tensor]:
    """Suffix -> tensor on the meta device, for every parameter that packing a stack adds beside it."""
    experts, blocks = shape[0], shape[1] * shape[2] // BLOCK
    found = {ABSMAX: torch.empty(experts, blocks, device="meta", dtype=torch.uint8 if double else torch.float32)}
    if double:
        found[SCALE] = torch.empty(experts, math.ceil(blocks / MAXIMA_BLOCK), device="meta")
        found[OFFSET] = torch.empty(experts, device="meta")
    return found


def pack(
    stack_EOI: Any, shape: tuple[int, int, int] | None = None, double: bool = False, experts: range | None = None
) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a packed stack, or of those `experts` of it: "" for the values, and one per placeholder.

    `stack_EOI[e]` gives the (O, I) matrix of expert e in floating point; it is asked for one at a time, so that a stack
    on disk is never in memory as a whole. Raises ValueError when O*I is not a multiple of 64.
    """
    total, rows, columns = shape or tuple(stack_EOI.shape)
    if not can_pack((total, rows, columns)):
        raise ValueError(f"a stack of shape {(total, rows, columns)} does not split into blocks of {BLOCK} per expert")
    wanted = range(total) if experts is None else experts
    made: dict[str, torch.Tensor] = {}
    for e, expert in enumerate(wanted):
        matrix = stack_EOI[expert].contiguous()
        if not made:
            made = {"": torch.empty(len(wanted), rows * columns // 2, dtype=torch.uint8, device=matrix.device)}
            for suffix, like in placeholders((len(wanted), rows, columns), double).items():
                made[suffix] = torch.empty_like(like, device=matrix.device)
        values, absmax = quantise(matrix)
        made[""][e] = values
        if double:
            offset = absmax.mean()
            made[ABSMAX][e], nested = quantize_blockwise(absmax - offset, blocksize=MAXIMA_BLOCK)
            made[SCALE][e], made[OFFSET][e] = nested.absmax, offset
        else:
            made[ABSMAX][e] = absmax
    return made


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed values, fp32 maxima) of a floating-point tensor, both flat.

    On a CPU piece by piece: bitsandbytes 0.50.2 works there with temporaries of about 25 bytes per value. Blocks know
    nothing of each other, so the bits are those of the whole.
    """
    flat = matrix.reshape(-1)
    pieces = [flat] if flat.is_cuda else flat.split(PIECE)
    done = [quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4") for piece in pieces]
    packed = torch.cat([values.view(-1) for values, _ in done])
    return packed, torch.cat([state.absmax for _, state in done])


def state_of(absmax: torch.Tensor, shape: torch.Size, dtype: torch.dtype, double: bool) -> QuantState:
    """What bitsandbytes keeps beside the packed values of a linear map of that shape and type."""
    known = {"shape": shape, "dtype": dtype, "blocksize": BLOCK, "quant_type": "nf4"}
    known["code"] = get_4bit_type("nf4", device=absmax.device)
    if not double:
        return QuantState(absmax=absmax, **known)
    offset = absmax.mean()
    small, nested = quantize_blockwise(absmax - offset, blocksize=MAXIMA_BLOCK)
    return QuantState(absmax=small, offset=offset, state2=nested, **known)


def maxima(module: Any, name: str, expert: int | None = None) -> torch.Tensor:
    """The fp32 maxima of one expert (O*I/64), or of all (E, O*I/64), of the packed stack `name` of a module."""
    stored = getattr(module, name + ABSMAX)
    if stored.dtype == torch.float32:
        return stored if expert is None else stored[expert]
    if expert is None and stored.shape[1] % MAXIMA_BLOCK:
        return torch.stack([maxima(module, name, e) for e in range(stored.shape[0])])  # blocks would straddle experts
    part = slice(None) if expert is None else slice(expert, expert + 1)
    scale, offset = getattr(module, name + SCALE)[part], getattr(module, name + OFFSET)[part]
    stored = stored[part]
    found = dequantize_blockwise(stored.reshape(-1), absmax=scale.reshape(-1), blocksize=MAXIMA_BLOCK)
    found = found.view_as(stored) + offset.unsqueeze(1)
    return found if expert is None else found[0]


def unpack(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One expert's (O, I) matrix, or a whole (E, O, I) stack, in `dtype`, from its packed values and fp32 maxima.

    Written into `out` where it is given: contiguous, of that shape and type.
    """
    size = math.prod(shape)
    # bitsandbytes' CPU kernel takes maxima row by row, so a row must be whole blocks.
    columns = shape[-1] if shape[-1] % BLOCK == 0 else BLOCK
    blocks = torch.Size((size // columns, columns))
    state = QuantState(absmax=absmax.reshape(-1), shape=blocks, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    if out is None:
        return dequantize_4bit(packed.reshape(-1, 1), state).view(shape)
    if out.is_cuda:  # bitsandbytes 0.50.2 writes into a given tensor on a GPU only
        dequantize_4bit(packed.reshape(-1, 1), state, out=out.view(blocks))
    else:
        out.copy_(dequantize_4bit(packed.reshape(-1, 1), state).view(shape))
    return out
