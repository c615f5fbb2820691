"""Routed experts with LoRA in split form: y = x W + s (x L) R, expert by expert, W frozen and possibly in 4 bits.

The product L R is never formed and nothing of the size of a stack is saved for the backward pass: W is read again
there (dequantised again when packed). `routing` sorts the tokens, `products` multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from finetune.experts.products import Grouped, Products, aligned_rank, arithmetic, products
from finetune.experts.routing import Combine, Dispatch, Routing, route, route_on_device
from finetune.experts.stack import layout_of, width


@dataclass(frozen=True, slots=True)
class Factors:
    """The LoRA update of one stack in the direction of the product: delta = scale * left @ right, per expert."""

    left_ENr: torch.Tensor
    """First factor of every expert."""
    right_ErM: torch.Tensor
    """Second factor of every expert."""
    scale: float
    """What their product is multiplied by."""


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
        routing: Routing,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_PN, left_ENr, right_ErM)
        ctx.scale, ctx.module, ctx.name, ctx.routing = scale, module, name, routing
        times = products(module, name, routing)
        with torch.autocast(device_type=x_PN.device.type, enabled=False):
            if not x_PN.shape[0]:
                return x_PN.new_zeros(0, width(module, name))
            x = x_PN.to(arithmetic(x_PN.dtype, x_PN.device))
            y_PM = times.frozen(x)
            if left_ENr is not None and right_ErM is not None:
                left, right = filled(left_ENr, right_ErM, times, x.dtype)
                times.add(y_PM, times.times(x, left), right, scale)
            return y_PM.to(x_PN.dtype)

    @staticmethod
    def backward(ctx: Any, grad_PM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x_PN, left_ENr, right_ErM = ctx.saved_tensors
        grad_left = None if left_ENr is None else torch.zeros_like(left_ENr)
        grad_right = None if right_ErM is None else torch.zeros_like(right_ErM)
        if not x_PN.shape[0]:
            return torch.zeros_like(x_PN), grad_left, grad_right, None, None, None, None
        times, scale = products(ctx.module, ctx.name, ctx.routing), ctx.scale
        tally(ctx.module, ctx.name, ctx.routing, grad_PM)
        with torch.autocast(device_type=x_PN.device.type, enabled=False):
            x = x_PN.to(arithmetic(x_PN.dtype, x_PN.device))
            grad = grad_PM.to(x.dtype).contiguous()
            grad_PN = times.frozen_back(grad) if ctx.needs_input_grad[0] else None
            if left_ENr is not None and right_ErM is not None:
                left, right = filled(left_ENr, right_ErM, times, x.dtype)
                rank = left_ENr.shape[2]
                through_Pr = times.times(grad, right.mT.contiguous()).mul_(scale)
                if grad_PN is not None:
                    times.add(grad_PN, through_Pr, left.mT.contiguous(), 1.0)
                grad_left = times.outer(x, through_Pr)[:, :, :rank].to(left_ENr.dtype)
                grad_right = times.outer(times.times(x, left), grad)[:, :rank].to(right_ErM.dtype) * scale
        grad_x = None if grad_PN is None else grad_PN.to(x_PN.dtype)
        return grad_x, grad_left, grad_right, None, None, None, None


def filled(
    left_ENr: torch.Tensor, right_ErM: torch.Tensor, times: Products, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the type of the arithmetic, their rank filled up with zeros where `grouped_mm` wants it."""
    left_ENr, right_ErM = left_ENr.to(dtype), right_ErM.to(dtype)
    more = aligned_rank(left_ENr.shape[2], dtype) - left_ENr.shape[2]
    if not isinstance(times, Grouped) or not more:
        return left_ENr.contiguous(), right_ErM.contiguous()
    return F.pad(left_ENr, (0, more)), F.pad(right_ErM, (0, 0, 0, more))


def tally(module: Any, name: str, routing: Routing, grad_PM: torch.Tensor) -> None:
    """Counts, on the module, rows with a gradient per expert: `finetune_heard` (E,), once per backward pass.

    An expert whose count is zero has learnt nothing and may keep an update of zero; any other may not.
    """
    layout = layout_of(module)
    if name != next(reversed(layout.shapes)):
        return
    heard_P = (grad_PM != 0).any(1)
    heard_E = torch.zeros(layout.shapes[name][0] + 1, dtype=torch.long, device=grad_PM.device)
    heard_E.index_add_(0, routing.expert_P, heard_P.long())
    before = getattr(module, "finetune_heard", None)
    module.finetune_heard = heard_E[:-1] if before is None else before + heard_E[:-1]


def plan(index_TK: torch.Tensor, module: Any, dtype: torch.dtype) -> Routing:
    """The plan for an experts module, of the kind its device wants."""
    layout = layout_of(module)
    experts = next(iter(layout.shapes.values()))[0]
    if index_TK.is_cuda and index_TK.numel():
        return route_on_device(index_TK, experts, absent=layout.absent)
    fill = arithmetic(dtype, index_TK.device) == torch.bfloat16  # oneDNN's; fp32 goes to a library without kernels
    return route(index_TK, experts, fill=fill, absent=layout.absent)


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: dict[str, Factors] | None = None,
    routing: Routing | None = None,
) -> torch.Tensor:
    """The routed experts' output (T, H): our entry in transformers' table of experts implementations.

    `self` is an experts module with `finetune_layout`; `lora` maps a stack's name to its factors. Activation, clamps
    and interleaving are the module's own `_apply_gate`; biases `<name>_bias` (E, M) are added where it has them.
    """
    lora = lora or {}
    first, second = layout_of(self).shapes
    routing = routing or plan(top_k_index, self, hidden_states.dtype)
    x_PH = Dispatch.apply(hidden_states, routing)
    gate_up = linear(self, first, x_PH, routing, lora)
    y_PH = linear(self, second, self._apply_gate(gate_up), routing, lora)
    return Combine.apply(y_PH, top_k_weights, routing).to(hidden_states.dtype)


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
        routing,
    )
    if not getattr(module, "has_bias", False):
        return y_PM
    bias_EM = getattr(module, name + "_bias")
    return y_PM + bias_EM[routing.expert_P.clamp(max=bias_EM.shape[0] - 1)].to(y_PM.dtype)
