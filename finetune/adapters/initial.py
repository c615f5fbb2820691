"""How A and B begin: `initialise(model, kind)`, for what PEFT cannot do to stacks, 4 bits, or a base kept as it is.

PiSSA and OLoRA train a part of the base itself: W = R + s B0 A0 with the main directions of W in B0 A0, R frozen. Here
W is never changed. The adapter is twice as wide: [B, -B0] and [A; A0], of which the second half gets no gradient. Its
product is B A - B0 A0, the same function and the same gradients, and the file is an ordinary one for the original base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from finetune.experts import ExpertsLora
from finetune.experts.stack import expert_weight, layout_of
from finetune.sizes import SUBTRACTING

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


@torch.no_grad()
def initialise(model: nn.Module, kind: str, adapter_name: str = "default") -> None:
    """Gives A and B of every adapted weight their first values; `kind` is `adapter.init`. The update B A stays zero."""
    if kind not in (*SUBTRACTING, "orthogonal"):
        return  # PEFT has done it
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        for expert, (a, b) in enumerate(factors(layer, adapter_name)):
            if kind == "orthogonal":
                first, second = orthogonal(a.shape, b.shape)
            else:
                weight = base_weight(layer, expert)
                half = main_directions(weight, a.shape[0] // 2, layer.scaling[adapter_name], kind)
                first, second = torch.cat([half[0], half[0]]), torch.cat([half[1], -half[1]], 1)
            a.copy_(first)
            b.copy_(second)
        if kind in SUBTRACTING:
            freeze_second_half(layer, adapter_name)


def factors(layer: Any, adapter_name: str) -> Iterator[Factors]:
    """Views of A and B in a layer's parameters: one pair, or one per expert of a stack."""
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    experts = getattr(layer, "num_experts", 1)
    a_ErI, b_OrE = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
    for expert in range(experts):
        yield a_ErI[expert], b_OrE[:, :, expert]


def base_weight(layer: Any, expert: int) -> torch.Tensor:
    """The frozen weight (out, in) that B A is added to, in fp32."""
    module = layer.get_base_layer()
    if not isinstance(layer, ExpertsLora):
        weight: torch.Tensor = dequantize_module_weight(module)
        return weight.float()
    stored = expert_weight(module, layer.parameter_name, expert, torch.float32)
    as_stored = stored if layout_of(module).transposed else stored.T
    return as_stored if layer._did_swap_in_out_features else as_stored.T


def main_directions(weight: torch.Tensor, rank: int, scale: float, kind: str) -> Factors:
    """A0, B0 with scale B0 A0 the part of `weight` that the method calls its main one.

    PiSSA (arXiv 2404.02948): the largest singular values, their roots on both sides. OLoRA (arXiv 2406.01775): the
    first columns of Q and rows of R.
    """
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if kind == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, columns = torch.svd_lowrank(weight, rank, niter=16)
        right = columns.T
    root = (values / scale).sqrt()
    return root[:, None] * right, left * root


def orthogonal(a_shape: torch.Size, b_shape: torch.Size) -> Factors:
    """Random A and B, neither of them zero, with B A = 0: their rows and columns lie in halves of one rotation."""
    rank, half = a_shape[0], a_shape[0] // 2
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    a = rotation[0::2].T @ torch.randn(half, a_shape[1], dtype=torch.float64) / 10
    b = torch.randn(b_shape[0], half, dtype=torch.float64) @ rotation[1::2] / 10
    return a, b


def freeze_second_half(layer: Any, adapter_name: str) -> None:
    """From now on no gradient reaches the second half of A and B. With it AdamW and its kin leave them as they are."""
    experts = getattr(layer, "num_experts", 1)

    def mask_a(gradient: torch.Tensor) -> torch.Tensor:
        parts = gradient.clone().view(experts, -1, gradient.shape[1])
        parts[:, parts.shape[1] // 2 :] = 0
        return parts.view_as(gradient)

    def mask_b(gradient: torch.Tensor) -> torch.Tensor:
        parts = gradient.clone().view(gradient.shape[0], -1, experts)
        parts[:, parts.shape[1] // 2 :] = 0
        return parts.view_as(gradient)

    layer.lora_A[adapter_name].weight.register_hook(mask_a)
    layer.lora_B[adapter_name].weight.register_hook(mask_b)


def without_update(layer: Any, whole_a: torch.Tensor, whole_b: torch.Tensor) -> list[int]:
    """The experts of a stack whose update B A is zero up to rounding; [0] for a single weight whose update is.

    A and B are given whole, wherever the layer's own lie. Every way to begin begins so, and nothing that learnt stays
    so.
    """
    a, b = whole_a.detach().double(), whole_b.detach().double()
    experts = getattr(layer, "num_experts", 1)
    a_ErI, b_EOr = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    # |B A|^2 = <B^T B, A A^T>, both of them small.
    size_E = ((b_EOr.mT @ b_EOr) * (a_ErI @ a_ErI.mT)).sum((1, 2)).clamp(min=0).sqrt()
    zero_E = size_E <= 1e-6 * a_ErI.flatten(1).norm(dim=1) * b_EOr.flatten(1).norm(dim=1)
    found: list[int] = zero_E.nonzero().flatten().tolist()
    return found
