"""Routed experts with LoRA in split form: y = x W + s (x L) R, expert by expert, W frozen and possibly in 4 bits.

One autograd function from tokens to tokens. For the backward pass it keeps the first projection's output and, of each
update, x L, which is as narrow as its rank, and nothing else of its own: sorted copies of the tokens, activations and
the second projection's output are made again there or are not needed, W is read again (unpacked again when it is in 4
bits), and the product L R is never formed. W and biases that are trained themselves get their gradients here too.
`routing` sorts the tokens, `products` multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from finetune.experts.products import ALIGNMENT, Grouped, Products, aligned_rank, arithmetic, products
from finetune.experts.routing import Routing, kept, route, route_on_device
from finetune.experts.stack import is_packed, layout_of


@dataclass(frozen=True, slots=True)
class Factors:
    """The LoRA update of one stack in the direction of the product: delta = scale * left @ right, per expert."""

    left_ENr: torch.Tensor
    """First factor of every expert."""
    right_ErM: torch.Tensor
    """Second factor of every expert."""
    scale: float
    """What their product is multiplied by."""


@dataclass(slots=True)
class Projection:
    """One stack at work on sorted rows, with its update and its bias where there are any."""

    module: Any
    """The experts module."""
    times: Products
    """The arithmetic."""
    left_ENr: torch.Tensor | None
    """First LoRA factor in the type of the arithmetic, None without an update."""
    right_ErM: torch.Tensor | None
    """Second LoRA factor."""
    scale: float
    """What their product is multiplied by."""
    bias_EM: torch.Tensor | None
    """Bias of every expert."""

    def forward(self, x_PN: torch.Tensor, expert_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y_PM = x W_e + scale (x L_e) R_e + b_e, x L_e of shape (P, r) or None without an update)."""
        y_PM, inner_Pr = self.times.frozen(x_PN), None
        if self.left_ENr is not None and self.right_ErM is not None:
            inner_Pr = self.times.times(x_PN, self.left_ENr)
            self.times.add(y_PM, inner_Pr, self.right_ErM, self.scale)
        if self.bias_EM is not None:
            y_PM += self.bias_P(expert_P).to(y_PM.dtype)
        return y_PM, inner_Pr

    def bias_P(self, expert_P: torch.Tensor) -> torch.Tensor:
        """The bias of every row (P, M); that of the last expert for rows of none."""
        assert self.bias_EM is not None
        return self.bias_EM[expert_P.clamp(max=self.bias_EM.shape[0] - 1)]

    def through(self, grad_PM: torch.Tensor) -> torch.Tensor | None:
        """scale * grad R_e^T (P, r), which both gradients of the update need; None without one."""
        if self.right_ErM is None:
            return None
        return self.times.times(grad_PM, self.right_ErM.mT.contiguous()).mul_(self.scale)

    def backward(self, grad_PM: torch.Tensor, through_Pr: torch.Tensor | None) -> torch.Tensor:
        """grad_PN = grad W_e^T + scale (grad R_e^T) L_e^T."""
        grad_PN = self.times.frozen_back(grad_PM)
        if through_Pr is not None and self.left_ENr is not None:
            self.times.add(grad_PN, through_Pr, self.left_ENr.mT.contiguous(), 1.0)
        return grad_PN

    def update(
        self,
        x_PN: torch.Tensor,
        grad_PM: torch.Tensor,
        through_Pr: torch.Tensor | None,
        inner_Pr: torch.Tensor | None,
        weight_P1: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of L (E, N, r), R (E, r, M), of rows whose gradient is `weight` times `grad`. `inner` is x L_e."""
        if through_Pr is None or inner_Pr is None:
            return None, None
        inner_Pr = inner_Pr * self.scale
        if weight_P1 is not None:
            inner_Pr, through_Pr = inner_Pr * weight_P1, through_Pr * weight_P1
        return self.times.outer(x_PN, through_Pr), self.times.outer(inner_Pr, grad_PM)

    def own(
        self, x_PN: torch.Tensor, grad_PM: torch.Tensor, weight_P1: torch.Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the stack itself, as it is stored, and of its bias (E, M), where they are `wanted`."""
        if not any(wanted):
            return None, None
        grad_PM = grad_PM if weight_P1 is None else grad_PM * weight_P1
        stack = bias = None
        if wanted[0] and layout_of(self.module).transposed:
            stack = self.times.outer(x_PN, grad_PM)
        elif wanted[0]:
            stack = self.times.outer(grad_PM, x_PN)
        if wanted[1]:
            ones_PA = grad_PM.new_ones(grad_PM.shape[0], ALIGNMENT // grad_PM.element_size())
            bias = self.times.outer(ones_PA, grad_PM)[:, 0]
        return stack, bias


class Routed(torch.autograd.Function):
    """hidden_TH, weights_TK -> the routed experts' output (T, H).

    The last four inputs are the module's own stacks and biases: named here so that they get gradients where they are
    trained, and read from the module.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        left_1: torch.Tensor | None,
        right_1: torch.Tensor | None,
        left_2: torch.Tensor | None,
        right_2: torch.Tensor | None,
        scales: tuple[float, float],
        module: Any,
        routing: Routing,
        *own: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = arithmetic(hidden_TH.dtype, hidden_TH.device)
        first, second = layout_of(module).shapes
        with torch.autocast(device_type=hidden_TH.device.type, enabled=False):
            up = projection(module, first, left_1, right_1, scales[0], routing, wide)
            middle_PM, inner_1 = up.forward(hidden_TH[routing.token_P].to(wide), routing.expert_P)
            middle_PM = middle_PM.to(hidden_TH.dtype)
            down = projection(module, second, left_2, right_2, scales[1], routing, wide)
            y_PH, inner_2 = down.forward(module._apply_gate(middle_PM).to(wide), routing.expert_P)
            rows_TKH = kept(y_PH.to(hidden_TH.dtype)[routing.position_TK], routing)
            output_TH = (rows_TKH * weights_TK.unsqueeze(-1)).sum(1).to(hidden_TH.dtype)
        ctx.save_for_backward(hidden_TH, weights_TK, middle_PM, inner_1, inner_2, left_1, right_1, left_2, right_2)
        ctx.scales, ctx.module, ctx.routing = scales, module, routing
        return output_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        hidden_TH, weights_TK, middle_PM, inner_1, inner_2, left_1, right_1, left_2, right_2 = ctx.saved_tensors
        module, routing, scales = ctx.module, ctx.routing, ctx.scales
        wide = arithmetic(hidden_TH.dtype, hidden_TH.device)
        first, second = layout_of(module).shapes
        with torch.autocast(device_type=hidden_TH.device.type, enabled=False):
            weight_P1 = spread(weights_TK, routing, wide)
            grad_PH = grad_TH.to(wide)[routing.token_P]
            tally(module, second, routing, grad_TH, weight_P1)
            with torch.enable_grad():
                middle = middle_PM.detach().requires_grad_()
                gated = module._apply_gate(middle)
            gated_PI = gated.detach().to(wide)
            down = projection(module, second, left_2, right_2, scales[1], routing, wide)
            through = down.through(grad_PH)
            # The gradient before the routing weight: its product with the row itself is that weight's gradient.
            plain_PI = down.backward(grad_PH, through)
            grad_weights = weights_gradient(plain_PI, gated_PI, grad_PH, down, routing).to(weights_TK.dtype)
            grad_left_2, grad_right_2 = down.update(gated_PI, grad_PH, through, inner_2, weight_P1)
            stack_1, stack_2, bias_1, bias_2 = ctx.needs_input_grad[9:]
            grad_stack_2, grad_bias_2 = down.own(gated_PI, grad_PH, weight_P1, (stack_2, bias_2))
            (grad_middle,) = torch.autograd.grad(gated, middle, (plain_PI * weight_P1).to(gated.dtype))
            grad_middle = grad_middle.to(wide).contiguous()
            del grad_PH, plain_PI, gated, gated_PI
            up = projection(module, first, left_1, right_1, scales[0], routing, wide)
            through = up.through(grad_middle)
            grad_hidden = None
            if ctx.needs_input_grad[0]:
                grad_PN = up.backward(grad_middle, through)
                grad_hidden = kept(grad_PN[routing.position_TK], routing).sum(1).to(hidden_TH.dtype)
            rows_PH = hidden_TH[routing.token_P].to(wide)
            grad_left_1, grad_right_1 = up.update(rows_PH, grad_middle, through, inner_1, None)
            grad_stack_1, grad_bias_1 = up.own(rows_PH, grad_middle, None, (stack_1, bias_1))
        return (
            grad_hidden,
            grad_weights,
            fitted(grad_left_1, left_1),
            fitted(grad_right_1, right_1),
            fitted(grad_left_2, left_2),
            fitted(grad_right_2, right_2),
            *(None, None, None),
            *(
                grad if grad is None or weight is None else grad.to(weight.dtype)
                for grad, weight in zip(
                    (grad_stack_1, grad_stack_2, grad_bias_1, grad_bias_2), own_weights(module), strict=True
                )
            ),
        )


def projection(
    module: Any,
    name: str,
    left_ENr: torch.Tensor | None,
    right_ErM: torch.Tensor | None,
    scale: float,
    routing: Routing,
    dtype: torch.dtype,
) -> Projection:
    """The stack `name` at work on a plan's rows in `dtype`, its rank filled up where `grouped_mm` wants that."""
    times = products(module, name, routing)
    bias_EM = bias_of(module, name)
    if left_ENr is None or right_ErM is None:
        return Projection(module, times, None, None, scale, bias_EM)
    left_ENr, right_ErM = left_ENr.to(dtype), right_ErM.to(dtype)
    more = aligned_rank(left_ENr.shape[2], dtype) - left_ENr.shape[2]
    if isinstance(times, Grouped) and more:
        left_ENr, right_ErM = F.pad(left_ENr, (0, more)), F.pad(right_ErM, (0, 0, 0, more))
    return Projection(module, times, left_ENr.contiguous(), right_ErM.contiguous(), scale, bias_EM)


def bias_of(module: Any, name: str) -> torch.Tensor | None:
    """The biases (E, M) that belong to a stack; None where it has none."""
    return getattr(module, name + "_bias") if getattr(module, "has_bias", False) else None


def spread(weights_TK: torch.Tensor, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
    """(P, 1): the routing weight of every row; zero for rows that only fill up a group or have no expert here."""
    weight_P = weights_TK.new_zeros(routing.token_P.shape[0], dtype=dtype)
    given_TK = weights_TK if routing.kept_TK is None else weights_TK.masked_fill(~routing.kept_TK, 0)
    weight_P[routing.position_TK.reshape(-1)] = given_TK.reshape(-1).to(dtype)
    return weight_P.unsqueeze(1)


def weights_gradient(
    plain_PI: torch.Tensor, gated_PI: torch.Tensor, grad_PH: torch.Tensor, down: Projection, routing: Routing
) -> torch.Tensor:
    """(T, K): the product of each row's output with the gradient of its token, without that output being kept.

    <y, g> = <a W, g> = <a, g W^T>, and g W^T is what the backward pass computes anyway; a bias adds <b, g>.
    """
    wide = torch.promote_types(plain_PI.dtype, torch.float32)
    found_P = (plain_PI.to(wide) * gated_PI.to(wide)).sum(-1)
    if down.bias_EM is not None:
        found_P += (down.bias_P(routing.expert_P).to(wide) * grad_PH.to(wide)).sum(-1)
    found_TK = found_P[routing.position_TK]
    return found_TK if routing.kept_TK is None else found_TK.masked_fill(~routing.kept_TK, 0)


def fitted(gradient: torch.Tensor | None, factor: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the type of its factor, without the filling of the rank."""
    if gradient is None or factor is None:
        return None if factor is None else torch.zeros_like(factor)
    return gradient[:, : factor.shape[1], : factor.shape[2]].to(factor.dtype)


def tally(module: Any, name: str, routing: Routing, grad_TH: torch.Tensor, weight_P1: torch.Tensor) -> None:
    """Counts, on the module, rows with a gradient per expert: `finetune_heard` (E,), once per backward pass.

    An expert whose count is zero has learnt nothing and may keep an update of zero; any other may not.
    """
    heard_P = (grad_TH != 0).any(1)[routing.token_P] & (weight_P1 != 0).squeeze(1)
    experts = layout_of(module).shapes[name][0]
    heard_E = torch.zeros(experts + 1, dtype=torch.long, device=grad_TH.device)
    heard_E.index_add_(0, routing.expert_P, heard_P.long())
    before = getattr(module, "finetune_heard", None)
    module.finetune_heard = heard_E[:-1] if before is None else before + heard_E[:-1]


def plan(index_TK: torch.Tensor, module: Any, dtype: torch.dtype) -> Routing:
    """The plan for an experts module, of the kind its device wants."""
    layout = layout_of(module)
    experts = next(iter(layout.shapes.values()))[0]
    if index_TK.is_cuda:
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
    if not hidden_states.shape[0]:
        return hidden_states.clone()
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):  # as a linear map would: norms in fp32 give fp32
        hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
    given = [lora[name] if lora and name in lora else None for name in layout_of(self).shapes]
    pairs = [(factors.left_ENr, factors.right_ErM) if factors else (None, None) for factors in given]
    output: torch.Tensor = Routed.apply(
        hidden_states,
        top_k_weights,
        *pairs[0],
        *pairs[1],
        tuple(factors.scale if factors else 0.0 for factors in given),
        self,
        routing or plan(top_k_index, self, hidden_states.dtype),
        *own_weights(self),
    )
    return output


def own_weights(module: Any) -> tuple[torch.Tensor | None, ...]:
    """Stacks and biases of an experts module, those in 4 bits left out: they cannot be trained."""
    names = tuple(layout_of(module).shapes)
    stacks = (None if is_packed(module, name) else getattr(module, name) for name in names)
    return (*stacks, *(bias_of(module, name) for name in names))
