"""Experts of families whose block hands every expert every token, scaled by a routing score that is mostly zero.

The stock module multiplies E*T rows although all but T*K of them are zero. A zero row gives a zero output and, because
the block multiplies by the same zero, no gradient: leaving it out changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.experts.grouped import Combine, Dispatch, Factors, linear, route
from finetune.experts.stack import layout_of


class RepeatedExperts(nn.Module):
    """Takes the place of a stock experts module; same parameters, and only rows that are not zero are computed."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.num_experts: int = stock.num_experts
        self.hidden_size: int = stock.hidden_size
        self.act_fn: Any = stock.act_fn
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, hidden_states: torch.Tensor, lora: dict[str, Factors] | None = None) -> torch.Tensor:
        """(E*T, H) -> (E*T, H): block e of T rows holds the tokens scaled by expert e's score."""
        lora = lora or {}
        first, second = layout_of(self).shapes
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        rows_R = (hidden_states != 0).any(-1).nonzero().squeeze(1)
        routing = route((rows_R // (hidden_states.shape[0] // self.num_experts)).unsqueeze(1), self.num_experts)
        x_PH = Dispatch.apply(hidden_states[rows_R], routing)
        gate, up = linear(self, first, x_PH, routing, lora).chunk(2, dim=-1)
        y_PH = linear(self, second, up * self.act_fn(gate), routing, lora)
        ones = torch.ones(rows_R.shape[0], 1, dtype=y_PH.dtype, device=y_PH.device)
        y_RH = Combine.apply(y_PH, ones, routing.position_TK)
        return torch.zeros_like(hidden_states).index_copy(0, rows_R, y_RH.to(hidden_states.dtype))


def take_over(model: nn.Module, path: str, stock: nn.Module) -> RepeatedExperts:
    """Puts a `RepeatedExperts` with the stock module's parameters at `path` of the model."""
    parent, _, leaf = path.rpartition(".")
    module = RepeatedExperts(stock)
    setattr(model.get_submodule(parent), leaf, module)
    return module
