"""Whole stacks unpacked on a GPU, each into a buffer that all layers share.

There is one buffer per projection, type and stream. It remembers whose weights it holds: under gradient checkpointing a
layer is computed again right before its backward pass, which then finds both of its stacks unpacked already. Nothing
keeps a reference to a buffer across calls, because the next layer overwrites it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.experts import nf4
from finetune.experts.stack import is_packed, layout_of


@dataclass(slots=True)
class Buffer:
    """Room for one unpacked stack."""

    tensor_EOI: torch.Tensor
    """The room."""
    owner: Any = None
    """Weak reference to the experts module whose stack it holds."""
    source: tuple[int, int] = (0, 0)
    """Address and version of the packed values it was made from: a stack that was loaded anew is unpacked anew."""


@dataclass(slots=True)
class Scratch:
    """The buffers, and how often a stack was unpacked into one or found there."""

    buffers: dict[Any, Buffer] = field(default_factory=dict)
    """By projection, shape, type, device and stream."""
    unpacked: int = 0
    """Stacks unpacked so far."""
    found: int = 0
    """Stacks that were there already."""

    def stack(self, module: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole stack (E, rows, columns) in `dtype`. Valid until the next call for the same projection."""
        values = getattr(module, name)
        if not is_packed(module, name):
            return values.detach().to(dtype)
        shape = layout_of(module).shapes[name]
        stream = torch.cuda.current_stream(values.device).cuda_stream if values.is_cuda else 0
        key = (name, shape, dtype, values.device, stream)
        if key not in self.buffers:
            self.buffers[key] = Buffer(torch.empty(shape, dtype=dtype, device=values.device))
        buffer, source = self.buffers[key], (values.data_ptr(), values._version)
        if buffer.owner is not None and buffer.owner() is module and buffer.source == source:
            self.found += 1
            return buffer.tensor_EOI
        buffer.owner = None  # until it is whole
        nf4.unpack(values, nf4.maxima(module, name), shape, dtype, out=buffer.tensor_EOI)
        buffer.owner, buffer.source = weakref.ref(module), source
        self.unpacked += 1
        return buffer.tensor_EOI

    def release(self) -> None:
        """Gives the memory back."""
        self.buffers.clear()


SCRATCH = Scratch()
"""The buffers of this process."""
