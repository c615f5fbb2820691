"""Loading a checkpoint with its experts in 4 bits, through the extension points transformers documents.

A registered quantisation config and quantizer: linear maps the family names become bitsandbytes' Linear4bit, expert
stacks become two parameters each (packed values, maxima), and everything else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
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
from finetune.ranks import Part
from finetune.shards import Weight

METHOD = "finetune_nf4"
"""Name of our quantisation method in transformers' registry."""

EXPERTS = "finetune_split"
"""Name of our experts implementation in transformers' registry."""

KNOWN_CHAINS: tuple[list[type], ...] = ([MergeModulelist], [MergeModulelist, Concatenate])
"""What transformers does to make a stack of one tensor per expert; `Gather` does the same, expert by expert."""


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """NF4, block 64, for linear maps and for expert stacks; `double_quantisation` stores its maxima in 8 bits.

    With `part` only that part of each stack is read and packed, and the bits of linear maps are stored under bf16:
    Accelerate leaves uint8 ones out of FSDP2 (accelerate 1.15.0).
    """

    def __init__(
        self,
        family: Family | None = None,
        weights: Mapping[str, Weight] | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
        double_quantisation: bool = False,
        part: Part | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantisation,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=torch.uint8 if part is None else torch.bfloat16,
        )
        self.quant_method = METHOD
        self.family, self.weights, self.part = family, weights, part
        self.largest_group = 0  # bytes on disk of the largest group of tensors that make one parameter
        self.problems: list[str] = []  # transformers swallows what a conversion raises; the loader reads it here

    def to_dict(self) -> dict[str, Any]:
        """Without what is ours: transformers writes this as JSON."""
        values: dict[str, Any] = super().to_dict()
        for ours in ("family", "weights", "part", "largest_group", "problems"):
            values.pop(ours, None)
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Nf4Config:
        """Itself: transformers copies a config several times, and the weights it names are open files."""
        return self


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantizer that packs expert stacks too, expert by expert as they are read."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the model is stored in 4 bits: Linear4bit weights and expert stacks."""
        return is_stack(model, param_name) or bool(super().param_needs_quantization(model, param_name, **kwargs))

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per parameter: 4 bits and a share of one maximum per 64."""
        if self.param_needs_quantization(model, param_name):
            return nf4.bytes_per_parameter(self.quantization_config.bnb_4bit_use_double_quant)
        return float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> Any:
        """The conversion step that packs what has just been read."""
        return Pack(self)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' table, in which the experts of a stack are gathered unread instead of stacked."""
        conversions = super().update_weight_conversions(weight_conversions)
        return [gathering(entry, self.quantization_config.family) for entry in conversions]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        settings = self.quantization_config
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        keep = [f"{re.escape(name)}$" for name in linears_to_keep(model, settings.family)]
        self.modules_to_not_convert = keep
        replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=settings)
        for module in prepare_experts(model, settings.family):
            for name, shape in module.finetune_layout.shapes.items():
                if not nf4.can_pack(shape):
                    raise ValueError(f"expert stack {name} {shape} does not split into blocks of {nf4.BLOCK}")
                for suffix, part in nf4.placeholders(shape, settings.bnb_4bit_use_double_quant).items():
                    module.register_parameter(name + suffix, nn.Parameter(part, requires_grad=False))
        self._defer(model)

    def _defer(self, model: PreTrainedModel) -> None:
        """Marks the weights of expert stacks, so that they are read when they are packed, one expert at a time."""
        settings = self.quantization_config
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        groups: dict[str, int] = {}
        for key, weight in (settings.weights or {}).items():
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            name = name if name in state else key
            if name in state:
                weight.deferred = is_stack(model, name)
                groups[name] = weight.bytes + (groups[name] if name in groups else 0)
        settings.largest_group = max(groups.values(), default=0)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """With a quantizer the loader compares no shapes: those of weights that stay as they are, compared here."""
        for name, parameter in model.named_parameters():
            if name in self.shapes and not self.param_needs_quantization(model, name):
                refuse_shape(self.quantization_config, name, tuple(parameter.shape), self.shapes[name])
        return super()._process_model_after_weight_loading(model, **kwargs)


def is_stack(model: nn.Module, name: str) -> bool:
    """Whether a parameter is an expert stack."""
    module, leaf = get_module_from_name(model, name)
    return hasattr(module, "finetune_layout") and leaf in module.finetune_layout.shapes


@dataclass(frozen=True, slots=True)
class Experts:
    """A stack whose experts lie one by one in the checkpoint: for each part of it, the weights of all experts."""

    parts: tuple[list[Weight], ...]
    """In the order in which they are joined along the output, e.g. gate and up."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, O, I), where E counts the experts that have all parts; of uneven ones the first odd shape."""
        if not all(self.parts):
            return (0,)
        for part in self.parts:
            for weight in part:
                if weight.shape != part[0].shape:
                    return weight.shape
        rows = sum(part[0].shape[0] for part in self.parts)
        return (min(map(len, self.parts)), rows, self.parts[0][0].shape[1])

    def __getitem__(self, expert: int) -> torch.Tensor:
        return torch.cat([part[expert].read() for part in self.parts])


class Gather(ConversionOps):
    """In the place of stacking and joining: notes which weights make a stack. `Pack` reads them one at a time."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Source pattern -> its weights by expert, to target pattern -> `Experts`."""
        return {target_patterns[0]: [Experts(tuple(input_dict.get(pattern, []) for pattern in source_patterns))]}


def gathering(entry: Any, family: Family) -> Any:
    """A conversion of transformers' table, with `Gather` as its operation where it makes an expert stack."""
    if not isinstance(entry, WeightConverter) or not family.experts:
        return entry
    leaves = tuple(f".experts.{name}" for name in family.expert_parameters)
    if not entry.target_patterns[0].endswith(leaves):
        return entry
    if [type(operation) for operation in entry.operations] not in KNOWN_CHAINS:
        raise ValueError(f"transformers stacks experts in a way that is new to us: {entry.operations}")
    twin = WeightConverter(list(entry.source_patterns), list(entry.target_patterns), [Gather()])
    twin.scope_prefix, twin.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
    return twin


class Pack(Bnb4bitQuantize):
    """Packs one weight while loading: an expert stack into several parameters, a linear map as bitsandbytes does."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Parameter name -> value(s) as read, to parameter name(s) -> value(s) as stored."""
        try:
            return self._packed(input_dict, full_layer_name, model, **kwargs)
        except Exception as error:
            self.hf_quantizer.quantization_config.problems.append(str(error))
            raise

    def _packed(self, input_dict: dict[str, Any], full_layer_name: Any, model: Any, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, torch.Tensor] = {}
        settings = self.hf_quantizer.quantization_config
        for name, value in input_dict.items():
            source = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            if not hasattr(module, "finetune_layout"):
                refuse_shape(settings, name, tuple(source.shape), (module.out_features, module.in_features))
                if source.is_cuda:
                    result |= super().convert({name: source}, full_layer_name=full_layer_name, model=model, **kwargs)
                else:
                    result[name] = packed_linear(module, source)
                continue
            shape = module.finetune_layout.shapes[leaf]
            refuse_shape(settings, name, tuple(source.shape), shape)
            mine = None if settings.part is None else settings.part.indices(shape[0])
            for suffix, tensor in nf4.pack(source, shape, settings.bnb_4bit_use_double_quant, mine).items():
                result[name + suffix] = nn.Parameter(tensor, requires_grad=False)
        return result


def packed_linear(module: Any, weight: torch.Tensor) -> Any:
    """The weight of a bitsandbytes linear map, packed piece by piece instead of all at once."""
    old = module.weight
    packed, absmax = nf4.quantise(weight)
    state = nf4.state_of(absmax, weight.shape, weight.dtype, old.compress_statistics)
    known = {key: value for key, value in vars(old).items() if key not in ("quant_state", "bnb_quantized")}
    module.quant_state = state
    module._is_hf_initialized = True
    return Params4bit(
        packed.view(old.quant_storage).unsqueeze(1), requires_grad=False, quant_state=state, bnb_quantized=True, **known
    )


def refuse_shape(config: Nf4Config, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Nothing, or ValueError, noted in the config too, when a weight has another shape than config.json means."""
    if found != expected:
        config.problems.append(f"{name} is {found} in the checkpoint and {expected} by its config.json")
        raise ValueError(config.problems[-1])


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
                module = take_over(model, path)
            set_layout(module, family.expert_parameters, family.transposed)
            found.append(module)
    if not found:
        raise ValueError(f"no {family.experts_class} at *.{family.experts} in {type(model).__name__}")
    return found


def register() -> None:
    """Enters our experts implementation into transformers' table. Importing this module has registered the rest."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


register()
