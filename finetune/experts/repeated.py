"""The routed block of families whose stock block hands every expert every token, scaled by a score mostly zero.

The stock block makes E copies of all tokens and multiplies E*T rows, although all but T*K of them are zero. A zero row
gives a zero output and, because it was multiplied by the same zero, no gradient: leaving it out changes nothing. Ours
multiplies T*K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.experts.grouped import Factors, experts_forward


class RoutedBlock(nn.Module):
    """Takes the place of a stock block; same router, experts and shared expert under the same names."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.top_k: int = stock.top_k
        self.hidden_dim: int = stock.hidden_dim
        self.router = stock.router
        self.experts = ScaledExperts(stock.experts)
        self.shared_expert = stock.shared_expert

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., H) -> ((T, H), router logits (T, E)), as the stock block does. A score scales an expert's *input*."""
        hidden_TH = hidden_states.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(hidden_TH)
        index_TK = torch.topk(logits_TE, self.top_k, dim=1).indices  # what the router itself does, for its scores
        scaled_TKH = hidden_TH.unsqueeze(1) * scores_TE.gather(1, index_TK).unsqueeze(-1)
        routed = self.experts(scaled_TKH.reshape(-1, self.hidden_dim), index_TK.reshape(-1, 1))
        return self.shared_expert(hidden_TH) + routed.view(scaled_TKH.shape).sum(1), logits_TE


class ScaledExperts(nn.Module):
    """The experts of such a block, with the parameters of the stock module."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.num_experts: int = stock.num_experts
        self.act_fn: Any = stock.act_fn
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(
        self, rows_RH: torch.Tensor, index_R1: torch.Tensor, lora: dict[str, Factors] | None = None
    ) -> torch.Tensor:
        """(R, H) -> (R, H): each row through its own expert."""
        ones = torch.ones(index_R1.shape, dtype=rows_RH.dtype, device=rows_RH.device)
        return experts_forward(self, rows_RH, index_R1, ones, lora=lora)

    def _apply_gate(self, gate_up_PM: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_PM.chunk(2, dim=-1)
        gated: torch.Tensor = up * self.act_fn(gate)
        return gated


def take_over(model: nn.Module, path: str) -> ScaledExperts:
    """Puts a `RoutedBlock` in the place of the block whose experts are at `path`; returns its experts."""
    block, _, _ = path.rpartition(".")
    parent, _, leaf = block.rpartition(".")
    routed = RoutedBlock(model.get_submodule(block))
    setattr(model.get_submodule(parent), leaf, routed)
    return routed.experts
