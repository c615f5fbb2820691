"""Where LoRA goes, how it begins, and the proof that it went there: `attach`, `load_adapter`, `coverage`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from finetune.adapters.coverage import adapted_parameters, check_coverage, coverage, coverage_table, print_coverage
from finetune.adapters.eva import Directions, begin_at, directions, eva_summary, left_out
from finetune.adapters.initial import initialise, without_update
from finetune.adapters.targets import lora_config, register_layers
from finetune.base import Base
from finetune.layouts import adaptable, foreign, read_adapter
from finetune.recipe import Adapter

__all__ = [
    "Directions",
    "adapted_parameters",
    "attach",
    "check_coverage",
    "coverage",
    "coverage_table",
    "directions",
    "eva_summary",
    "keeping_fp32",
    "load_adapter",
    "print_coverage",
    "to_fp32",
    "without_update",
]


def attach(base: Base, adapter: Adapter, begin: Directions | None = None) -> PeftModel:
    """The base with a new adapter in fp32 whose update is zero: by default A is random (from torch's seed), B zero.

    `begin` are the directions of `adapter.init=eva`: first values of A, and with them the ranks.
    Raises RecipeError (ADP-005) for a rank or alpha pattern that fits nothing, NumbersError (ADP-010) when the adapted
    weights are not exactly those the settings ask for.
    """
    with warnings.catch_warnings():
        # PEFT looks for rank patterns among modules only, says that ours for stacks match nothing, and applies them.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        model = get_peft_model(
            base.model, lora_config(base, adapter, {path: len(a) for path, a in (begin or {}).items()})
        )
    to_fp32(model)
    initialise(model, adapter.init)
    begin_at(model, begin or {})
    check_coverage(model, base.family, adapter, left_out(begin or {}))
    return model


def load_adapter(base: Base, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The base with the adapter in `folder`, a PEFT folder in any layout that `layouts` can read.

    Raises AdapterError: ADP-011 unless the file holds exactly the weights that its settings mean for this base, ADP-012
    to ADP-016 when it cannot be read without guessing.
    """
    adapter = read_adapter(folder, adaptable(base.model, base.family))
    config = adapter.config
    config.inference_mode = not trainable
    register_layers(config, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        try:
            model = PeftModelForCausalLM(base.model, config)
        except ValueError as error:  # PEFT finds no layer for the settings
            raise foreign(folder, str(error).splitlines()[0]) from error
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        if adapter.tensors.keys() != wanted:
            different = sorted(adapter.tensors.keys() ^ wanted)
            raise foreign(folder, f"{len(different)} weights are on one side only, e.g. {different[0]}")
        set_peft_model_state_dict(model, adapter.tensors)
    to_fp32(model)
    return model if trainable else model.eval()


def to_fp32(model: nn.Module) -> None:
    """Keeps every trained weight in fp32, whatever a library cast it to: bf16 loses updates below 1/256 of a weight."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


@contextmanager
def keeping_fp32(model: nn.Module) -> Iterator[None]:
    """Afterwards the trained weights are as they were before, to the last bit, whatever a library cast them to inside.

    TRL casts those of a 4-bit model to bf16: an update of zero would not stay zero, nor a length in DoRA its row's.
    """
    before = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter, values in before.items():
        parameter.data = values.to(parameter.device)
