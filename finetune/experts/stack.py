"""How one module's expert weights are read: packed or plain, whichever way round they are stored.

Legend of shape letters in this package: T tokens, K experts per token, P rows (token-choice pairs sorted by expert), E
experts, H hidden, I expert intermediate, O output features, r LoRA rank, N input features, M output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.experts import nf4


@dataclass(frozen=True, slots=True)
class Layout:
    """What an experts module cannot say of its own weights once they are packed. Kept on it as `finetune_layout`."""

    shapes: dict[str, tuple[int, int, int]]
    """Parameter name -> logical shape (E, rows, columns) as stored in the unpacked model, in order of use."""
    transposed: bool
    """Stored as (E, in, out): y = x W. Otherwise (E, out, in): y = x W^T."""
    dtype: torch.dtype
    """Floating-point type of the unpacked weights."""
    absent: bool = False
    """Routing may name an expert that is not here (expert parallelism), by the id E."""


def layout_of(module: Any) -> Layout:
    """The layout that loading left on an experts module."""
    layout: Layout = module.finetune_layout
    return layout


def set_layout(module: Any, names: tuple[str, ...], transposed: bool) -> None:
    """Notes the layout of an experts module; call it while its stacks still have their logical shapes."""
    shapes = {name: tuple(getattr(module, name).shape) for name in names}
    module.finetune_layout = Layout(shapes, transposed, getattr(module, names[0]).dtype)


def is_packed(module: Any, name: str) -> bool:
    """Whether the stack `name` of an experts module is stored in 4 bits."""
    packed: bool = getattr(module, name).dtype == torch.uint8
    return packed


def expert_weight(module: Any, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weight as (in, out) in `dtype`: y = x @ weight. Dequantised on the fly when packed."""
    layout = layout_of(module)
    stack = getattr(module, name)
    if is_packed(module, name):
        weight = nf4.unpack(stack[expert], nf4.maxima(module, name, expert), layout.shapes[name][1:], dtype)
    else:
        weight = stack[expert].detach().to(dtype)
    return weight if layout.transposed else weight.T


def width(module: Any, name: str, *, back: bool = False) -> int:
    """Output features of one expert's product with the stack `name`; its input features with `back`."""
    layout = layout_of(module)
    _, rows, columns = layout.shapes[name]
    return columns if layout.transposed != back else rows
