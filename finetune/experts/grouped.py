"""Routed experts with LoRA in split form: y = x W + s (x L) R, expert by expert, W frozen and possibly in 4 bits.

The product L R is never formed and nothing of the size of a stack is saved for the backward pass: W is read again
there (dequantised again when packed). Only experts that received tokens are touched.

Tokens are sorted by expert and every expert's rows are padded to a multiple of 64: matrix shapes then repeat from step
to step, and oneDNN, which builds a kernel for every new shape on a CPU, finds them in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.experts.stack import expert_weight, width

ROWS = 64
"""Rows of one expert are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The LoRA update of one stack in the direction of the product: delta = scale * left @ right, per expert."""

    left_ENr: torch.Tensor
    """First factor of every expert."""
    right_ErM: torch.Tensor
    """Second factor of every expert."""
    scale: float
    """What their product is multiplied by."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each (token, choice) pair stands among the rows sorted by expert."""

    token_P: torch.Tensor
    """Token whose values a padded row holds; rows that are only padding hold token 0 and are never read back."""
    position_TK: torch.Tensor
    """Padded row of each pair."""
    groups: list[tuple[int, int, int]]
    """(expert, first row, end row) of every expert with tokens; rows are padded to a multiple of `ROWS`."""


def route(index_TK: torch.Tensor, num_experts: int) -> Routing:
    """Sorts (token, choice) pairs by expert, stably, and pads each expert's rows.

    Ids outside 0..num_experts-1 (the mark expert parallelism uses for experts of other ranks) raise ValueError.
    """
    tokens, choices = index_TK.shape
    ids = index_TK.reshape(-1)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_experts):
        raise ValueError(f"routing names expert {int(ids.max())} of {num_experts}: expert parallelism is not supported")
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts)
    padded = (counts + ROWS - 1) // ROWS * ROWS
    starts = torch.cumsum(padded, 0) - padded
    first = torch.cumsum(counts, 0) - counts
    sorted_ids = ids[order]
    rows = starts[sorted_ids] + torch.arange(ids.numel(), device=ids.device) - first[sorted_ids]
    position = torch.empty_like(ids)
    position[order] = rows
    token_P = torch.zeros(int(padded.sum()), dtype=torch.long, device=ids.device)
    token_P[rows] = order // max(choices, 1)
    groups = [
        (e, start, start + size)
        for e, (start, size) in enumerate(zip(starts.tolist(), padded.tolist(), strict=True))
        if size > 0
    ]
    return Routing(token_P, position.view(tokens, choices), groups)


class Dispatch(torch.autograd.Function):
    """x_TH -> x_PH, rows sorted by expert. The backward pass adds each token's K rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:  # noqa: D102
        ctx.position_TK = routing.position_TK
        return x_TH[routing.token_P]

    @staticmethod
    def backward(ctx: Any, grad_PH: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: D102
        return grad_PH[ctx.position_TK].sum(1), None


class Combine(torch.autograd.Function):
    """y_PH, weights_TK -> sum over a token's K rows of weight * row, added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, y_PH: torch.Tensor, weights_TK: torch.Tensor, position_TK: torch.Tensor) -> torch.Tensor:  # noqa: D102
        ctx.save_for_backward(y_PH, weights_TK)
        ctx.position_TK = position_TK
        rows_TKH = y_PH[position_TK]
        return (rows_TKH * weights_TK.unsqueeze(-1)).sum(1).to(y_PH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # noqa: D102
        y_PH, weights_TK = ctx.saved_tensors
        position_TK = ctx.position_TK
        grad_y = torch.zeros_like(y_PH)
        grad_y[position_TK.reshape(-1)] = (
            (grad_TH.unsqueeze(1) * weights_TK.unsqueeze(-1)).to(y_PH.dtype).reshape(-1, y_PH.shape[1])
        )
        wide = torch.promote_types(y_PH.dtype, torch.float32)
        grad_weights = (y_PH[position_TK].to(wide) * grad_TH.unsqueeze(1).to(wide)).sum(-1).to(weights_TK.dtype)
        return grad_y, grad_weights, None


class GroupedLinear(torch.autograd.Function):
    """y_PM = x_PN W_e + scale (x_PN left_e) right_e, with e the expert of the row. W gets no gradient."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x_PN: torch.Tensor,
        left_ENr: torch.Tensor | None,
        right_ErM: torch.Tensor | None,
        scale: float,
        module: Any,
        name: str,
        groups: list[tuple[int, int, int]],
    ) -> torch.Tensor:
        ctx.save_for_backward(x_PN, left_ENr, right_ErM)
        ctx.scale, ctx.module, ctx.name, ctx.groups = scale, module, name, groups
        y_PM = x_PN.new_empty(x_PN.shape[0], width(module, name))
        with torch.autocast(device_type=x_PN.device.type, enabled=False):
            for e, start, end in groups:
                x, y = x_PN[start:end], y_PM[start:end]
                torch.mm(x, expert_weight(module, name, e, x.dtype), out=y)
                if left_ENr is not None and right_ErM is not None:
                    y.addmm_(x @ left_ENr[e].to(x.dtype), right_ErM[e].to(x.dtype), alpha=scale)
        return y_PM

    @staticmethod
    def backward(ctx: Any, grad_PM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x_PN, left_ENr, right_ErM = ctx.saved_tensors
        grad_x = torch.empty_like(x_PN)
        grad_left = None if left_ENr is None else torch.zeros_like(left_ENr)
        grad_right = None if right_ErM is None else torch.zeros_like(right_ErM)
        with torch.autocast(device_type=x_PN.device.type, enabled=False):
            for e, start, end in ctx.groups:
                g, x, grad = grad_PM[start:end].to(x_PN.dtype), x_PN[start:end], grad_x[start:end]
                torch.mm(g, expert_weight(ctx.module, ctx.name, e, x.dtype).T, out=grad)
                if grad_left is not None and grad_right is not None:
                    left, right = left_ENr[e].to(x.dtype), right_ErM[e].to(x.dtype)
                    through = (g @ right.T) * ctx.scale  # (rows, r)
                    grad.addmm_(through, left.T)
                    grad_left[e] = x.T @ through
                    grad_right[e] = (x @ left).T @ g * ctx.scale
        return grad_x, grad_left, grad_right, None, None, None, None


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: dict[str, Factors] | None = None,
) -> torch.Tensor:
    """The routed experts' output (T, H): our entry in transformers' table of experts implementations.

    `self` is an experts module with `finetune_layout`; `lora` maps a stack's name to its factors. Activation, clamps
    and interleaving are the module's own `_apply_gate`; biases `<name>_bias` (E, M) are added where it has them.
    """
    lora = lora or {}
    first, second = self.finetune_layout.shapes
    routing = route(top_k_index, self.num_experts)
    x_PH = Dispatch.apply(hidden_states, routing)
    gate_up = linear(self, first, x_PH, routing, lora)
    y_PH = linear(self, second, self._apply_gate(gate_up), routing, lora)
    return Combine.apply(y_PH, top_k_weights, routing.position_TK).to(hidden_states.dtype)


def linear(module: Any, name: str, x_PN: torch.Tensor, routing: Routing, lora: dict[str, Factors]) -> torch.Tensor:
    """One grouped projection of the sorted rows, with its LoRA update and its bias where there are any."""
    factors = lora[name] if name in lora else None
    y_PM = GroupedLinear.apply(
        x_PN,
        factors.left_ENr if factors else None,
        factors.right_ErM if factors else None,
        factors.scale if factors else 0.0,
        module,
        name,
        routing.groups,
    )
    bias_EM = getattr(module, name + "_bias") if getattr(module, "has_bias", False) else None
    if bias_EM is None:
        return y_PM
    sizes = torch.tensor([end - start for _, start, end in routing.groups], device=x_PN.device)
    experts = torch.tensor([e for e, _, _ in routing.groups], device=x_PN.device)
    return y_PM + bias_EM[experts.repeat_interleave(sizes)].to(y_PM.dtype)
