"""Loading a checkpoint with its experts in 4 bits, through the extension points transformers documents.

A registered quantisation config and quantizer: linear maps the family names become bitsandbytes' Linear4bit, expert
stacks become two parameters each (packed values, maxima), and everything else stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.experts import nf4
from finetune.experts.grouped import experts_forward
from finetune.experts.repeated import take_over
from finetune.experts.stack import set_layout
from finetune.families.family import Family

METHOD = "finetune_nf4"
"""Name of our quantisation method in transformers' registry."""

EXPERTS = "finetune_split"
"""Name of our experts implementation in transformers' registry."""


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """NF4, block 64, no double quantisation, for linear maps and for expert stacks."""

    def __init__(
        self, family: Family | None = None, compute_dtype: torch.dtype = torch.bfloat16, **kwargs: Any
    ) -> None:
        kwargs.pop("quant_method", None)
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=False,
            bnb_4bit_compute_dtype=compute_dtype,
        )
        self.quant_method = METHOD
        self.family = family
        self.wrong_shapes: list[str] = []  # transformers swallows what a conversion raises; the loader reads it here

    def to_dict(self) -> dict[str, Any]:
        """Without what is ours: transformers writes this as JSON."""
        values: dict[str, Any] = super().to_dict()
        for ours in ("family", "wrong_shapes"):
            values.pop(ours, None)
        return values


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantizer that packs expert stacks too."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the model is stored in 4 bits: Linear4bit weights and expert stacks."""
        module, name = get_module_from_name(model, param_name)
        if hasattr(module, "finetune_layout") and name in module.finetune_layout.shapes:
            return True
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per parameter: 4 bits and a share of one fp32 maximum per 64."""
        if self.param_needs_quantization(model, param_name):
            return 0.5 + 4 / nf4.BLOCK
        return float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> Any:
        """The conversion step that packs what has just been read."""
        return Pack(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        family = self.quantization_config.family
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        keep = [f"{re.escape(name)}$" for name in linears_to_keep(model, family)]
        self.modules_to_not_convert = keep
        replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=self.quantization_config)
        for module in prepare_experts(model, family):
            for name, shape in module.finetune_layout.shapes.items():
                if not nf4.can_pack(shape):
                    raise ValueError(f"expert stack {name} {shape} does not split into blocks of {nf4.BLOCK}")
                placeholder = torch.empty(shape[0], shape[1] * shape[2] // nf4.BLOCK, device="meta")
                module.register_parameter(name + nf4.ABSMAX, nn.Parameter(placeholder, requires_grad=False))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """With a quantizer the loader compares no shapes: those of weights that stay as they are, compared here."""
        for name, parameter in model.named_parameters():
            if name in self.shapes and not self.param_needs_quantization(model, name):
                refuse_shape(self.quantization_config, name, tuple(parameter.shape), self.shapes[name])
        return super()._process_model_after_weight_loading(model, **kwargs)


class Pack(Bnb4bitQuantize):
    """Packs one tensor while loading: an expert stack into two parameters, a linear map as bitsandbytes does."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Parameter name -> value(s) as read, to parameter name(s) -> value(s) as stored."""
        result: dict[str, torch.Tensor] = {}
        settings = self.hf_quantizer.quantization_config
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            if not hasattr(module, "finetune_layout"):
                refuse_shape(settings, name, tuple(tensor.shape), (module.out_features, module.in_features))
                result |= super().convert({name: tensor}, full_layer_name=full_layer_name, model=model, **kwargs)
                continue
            refuse_shape(settings, name, tuple(tensor.shape), module.finetune_layout.shapes[leaf])
            packed, absmax = nf4.pack(tensor)
            result[name] = nn.Parameter(packed, requires_grad=False)
            result[name + nf4.ABSMAX] = nn.Parameter(absmax, requires_grad=False)
        return result


def refuse_shape(config: Nf4Config, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Nothing, or ValueError, noted in the config too, when a weight has another shape than config.json means."""
    if found != expected:
        config.wrong_shapes.append(f"{name} is {found} in the checkpoint and {expected} by its config.json")
        raise ValueError(config.wrong_shapes[-1])


def linears_to_keep(model: nn.Module, family: Family) -> list[str]:
    """Paths of linear maps that stay as they are: all that the family does not name (routers, gates, heads ...)."""
    named = family.attention + family.shared + family.dense
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(path.endswith("." + name) for name in named)
    ]


def prepare_experts(model: Any, family: Family) -> list[Any]:
    """The experts modules of a model, each with its layout noted. Call it before the stacks are packed."""
    if not family.experts:
        return []
    found = []
    for path, module in list(model.named_modules()):
        if type(module).__name__ == family.experts_class and path.endswith("." + family.experts):
            if family.repeats_tokens:
                module = take_over(model, path, module)
            set_layout(module, family.expert_parameters, family.transposed)
            found.append(module)
    if not found:
        raise ValueError(f"no {family.experts_class} at *.{family.experts} in {type(model).__name__}")
    return found


def register() -> None:
    """Enters our experts implementation into transformers' table. Importing this module has registered the rest."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


register()
