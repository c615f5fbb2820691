"""What training saw of a weight that was in 4 bits: packed into NF4 as loading packs it, and unpacked again."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from finetune.experts import nf4


@dataclass(frozen=True, slots=True)
class FourBit:
    """How the base was held while the adapter was trained."""

    precision: str
    """Type of the arithmetic, `bf16` or `fp32`: weights are cast to it before they are packed, and unpacked into it."""
    double_quantisation: bool
    """The maxima of NF4 are in 8 bits too."""

    @property
    def dtype(self) -> torch.dtype:
        """The same as a type."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def is_local(self, values: int) -> bool:
        """Whether a part of so many values of a matrix may be packed alone: its blocks and their scales are its own."""
        return values % nf4.BLOCK == 0 and not self.double_quantisation

    def seen(self, matrix: torch.Tensor, *, stacked: bool) -> torch.Tensor:
        """One expert's matrix (`stacked`) or that of a linear map, as the layers of the training unpacked it."""
        matrix = matrix.to(self.dtype)
        if not stacked:
            from bitsandbytes.functional import dequantize_4bit

            packed, absmax = nf4.quantise(matrix)
            state = nf4.state_of(absmax, matrix.shape, self.dtype, self.double_quantisation)
            return dequantize_4bit(packed.view(-1, 1), state).view(matrix.shape)
        packed_1 = nf4.pack([matrix], (1, *matrix.shape), self.double_quantisation)
        holder = SimpleNamespace(**{f"stack{suffix}": tensor for suffix, tensor in packed_1.items()})
        absmax = nf4.maxima(holder, "stack", 0)
        return nf4.unpack(packed_1[""][0], absmax, tuple(matrix.shape), self.dtype)
