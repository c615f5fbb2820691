"""EVA: A begins at the main directions of what a linear map is given on training rows, and ranks go where they explain.

`directions` asks PEFT (`get_eva_state_dict`) for them; EVA is arXiv 2410.07170. Expert stacks are no linear maps to
PEFT, and each expert is given other tokens: they begin as they do by default, and so do routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune import sizes
from finetune.adapters.coverage import adapted_parameters
from finetune.adapters.targets import wanted_names
from finetune.base import Base
from finetune.errors import NumbersError
from finetune.families.family import LAYER
from finetune.progress import real_tokens
from finetune.recipe import Adapter

PASSES = 1000
"""Forward passes after which directions that still turn are given up."""

Directions = dict[str, torch.Tensor]
"""Path of a linear map in the bare model -> A (rank, in) to begin with; rank 0 where it gets no update at all."""


def directions(base: Base, adapter: Adapter, batches: Sequence[dict[str, torch.Tensor]]) -> Directions:
    """The directions of every linear map that is adapted, from all tokens of `batches` that are no padding.

    Batches are read again and again until the directions stay. Raises NumbersError (ADP-020) when they do not.
    """
    names = wanted_names(base.family, adapter) - {f"{base.family.router}.weight"}
    maps = [
        path
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and (match := LAYER.search(path)) and f"{match[2]}.weight" in names
    ]
    config = LoraConfig(
        r=adapter.rank,
        target_modules=maps,
        rank_pattern={path: sizes.rank_at(path, False, adapter)[0] for path in maps},
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=adapter.eva_rho),
    )
    left = PASSES

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise NumbersError(
                "ADP-020",
                f"the directions of EVA still turn after {PASSES} forward passes",
                "a batch must have more tokens than adapter.rank x adapter.eva_rho, and alike in all batches",
                "a larger train.batch_size, a smaller adapter.rank, or adapter.init=default",
            )
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        model.base_model(**inputs, use_cache=False)  # below the head: nobody reads the logits

    with base.arithmetic():
        found: Directions = get_eva_state_dict(
            base.model,
            list(batches),
            config,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _: real_tokens(batch).reshape(-1),
            prepare_layer_inputs_fn=_rows,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    return {path: found[path].float().cpu().contiguous() for path in maps}


def _rows(given: Any, real_T: torch.Tensor, name: str) -> torch.Tensor:
    """What a map was given for tokens that are no padding, one row each; blocks of experts flatten their tokens."""
    values: torch.Tensor = given[0] if isinstance(given, tuple | list) else given
    return values.reshape(-1, values.shape[-1])[real_T]


def begin_at(model: nn.Module, found: Directions, adapter_name: str = "default") -> None:
    """Gives every A its directions; B is zero, and so is the update."""
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    with torch.no_grad():
        for path, directions_rI in found.items():
            if len(directions_rI):
                layers[path].lora_A[adapter_name].weight.copy_(directions_rI)


def left_out(found: Directions) -> set[str]:
    """Paths of maps that get no update: other maps explain more with the same ranks."""
    return {path for path, directions_rI in found.items() if not len(directions_rI)}


def eva_summary(found: Directions, model: nn.Module) -> dict[str, Any]:
    """What became of the ranks, for train.json."""
    plain = (path.removesuffix(".weight") for path in adapted_parameters(model))
    by_default = sorted(path for path in plain if path not in found)
    return {
        "ranks": {path: len(directions_rI) for path, directions_rI in found.items()},
        "without_update": sorted(left_out(found)),
        "begun_by_default": by_default,
    }
