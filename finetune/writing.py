"""Weights written as a safetensors file in plain numbers, one after the other: `write_weights`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.shards import Weight

PLAIN = "BF16"
"""What fp8 and fp4 weights are written as, in safetensors' words."""


def write_weights(weights: Iterable[Weight], target: Path, change: Callable[[Weight, Any], Any]) -> None:
    """Writes `weights` into the file `target`: fp8 and fp4 ones as bf16, others in their own type.

    `change(weight, tensor)` gives what is written instead of the tensor that was read, in its shape; a quantised one
    comes in fp32 and is rounded once, afterwards. Memory: one weight.
    """
    import torch

    ordered = sorted(weights, key=lambda weight: weight.key)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for weight in ordered:
        end = start + written_bytes(weight)
        header[weight.key] = {"dtype": _type(weight), "shape": list(weight.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in ordered:
            tensor = change(weight, weight.read())
            if weight.is_quantised:
                tensor = tensor.to(torch.bfloat16)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def written_bytes(weight: Weight) -> int:
    """Bytes of a weight in the file that `write_weights` makes."""
    if not weight.is_quantised:
        return weight.entries[0].bytes
    count = 2
    for length in weight.shape:
        count *= length
    return count


def _type(weight: Weight) -> str:
    return PLAIN if weight.is_quantised else weight.entries[0].dtype
