"""How many parameters and bytes a model card and an adapter mean. Arithmetic only: no weights, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.errors import RecipeError
from finetune.families import FAMILIES, Family, Group, Matrix
from finetune.families.family import LAYER
from finetune.recipe import Adapter, Model

GIB = 2**30
NF4_BYTES = 0.5 + 4 / 64
"""Bytes per parameter in NF4: half a byte, and an fp32 absmax per block of 64."""
NF4_DOUBLE_BYTES = 0.5 + (1 + 4 / 256) / 64
"""The same with double quantisation: an 8-bit absmax per block, and an fp32 scale per 256 of them."""
BF16_BYTES = 2
FP32_BYTES = 4
SUBTRACTING = ("olora", "pissa", "pissa_niter_16")
"""Values of `adapter.init` that begin at directions of the base, and so must subtract them from it."""

WHOLE: dict[str, tuple[Group, ...]] = {
    "attention": ("attention",),
    "experts": ("attention", "routed"),
    "all": ("attention", "routed", "shared", "dense", "other"),
}
"""`adapter.targets` -> the groups whose every weight full fine-tuning trains."""


def family_of_card(model: Model) -> Family:
    """The family that a model card names. Raises RecipeError (MOD-002) when there is none of that name."""
    if model.family not in FAMILIES:
        exist = ", ".join(sorted(FAMILIES))
        raise RecipeError([f"MOD-002 model.family={model.family or '(empty)'} does not exist. Choose one of: {exist}."])
    return FAMILIES[model.family]


def shape_config(model: Model) -> Mapping[str, Any]:
    """The config fields that determine shapes: the family's tiny ones, the card's, or those of `model.source`.

    Raises RecipeError (MOD-003) when there are none.
    """
    family = family_of_card(model)
    if model.tiny:
        return family.tiny
    if model.config:
        return family.text_part(model.config)
    file = Path(model.source).expanduser() / "config.json"
    if model.source and file.is_file():
        return family.text_part(json.loads(file.read_text(encoding="utf-8")))
    why = "MOD-003 model.config is empty: nothing says how large the model is."
    raise RecipeError([f"{why} Choose a card with model=NAME, or a folder with config.json as model.source."])


def matrices(model: Model) -> list[Matrix]:
    """Every weight of the base. Raises RecipeError (MOD-003) when a field of the config is missing."""
    family, config = family_of_card(model), shape_config(model)
    try:
        return family.matrices(config)
    except KeyError as error:
        lacks = f"MOD-003 model.config lacks {error.args[0]}, which the family {family.key} needs."
        raise RecipeError([f"{lacks} Copy it from the published config.json."]) from None


def total_parameters(weights: list[Matrix]) -> int:
    """All parameters of the base (text part)."""
    return sum(m.parameters for m in weights)


def active_parameters(weights: list[Matrix]) -> int:
    """Parameters that one token is multiplied with, the output head included and the input embedding (a lookup) not.

    Where head and embedding are one tied matrix it is the head that counts.
    """
    embeddings = [m for m in weights if m.group == "embedding"]
    lookup = embeddings[0].parameters if len(embeddings) > 1 else 0
    return sum(m.active_parameters for m in weights if m.columns > 1) - lookup


def update_of(matrix: Matrix, family: Family, adapter: Adapter) -> Literal["", "weight", "stack"]:
    """Whether `adapter` has an update of this weight: as a linear map, as an expert stack, or none."""
    if matrix.experts:
        module, _, name = matrix.name.rpartition(".")
        stack = module == family.experts and name in family.expert_parameters and matrix.columns > 1
        return "stack" if stack and adapter.targets != "attention" else ""
    names = set(family.attention)
    if adapter.targets == "all":
        names |= {*family.shared, *family.dense}
    if adapter.router:
        names.add(family.router)
    return "weight" if matrix.name in names else ""


def is_trained(path: str, family: Family, adapter: Adapter) -> bool:
    """Whether full fine-tuning trains the parameter at a path of the bare model."""
    match = LAYER.search(path)
    if match and any(match[2].startswith(name + ".") for name in family.unreachable):
        return False
    group = family.group_of(path)
    asked = group in WHOLE[adapter.targets]
    return asked or (group == "router" and adapter.router) or (group == "embedding" and adapter.embeddings)


def is_trained_whole(matrix: Matrix, family: Family, adapter: Adapter) -> bool:
    """The same of one kind of weight; False with any other method."""
    if adapter.method != "full":
        return False
    name = f"{matrix.name}.weight"
    return is_trained(name if matrix.group == "embedding" else f"layers.0.{name}", family, adapter)


def pattern_of(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern for a weight's path without `.weight`, by PEFT's rule: it fits the end, from a dot on."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?(?:{pattern})$", name)), None)


def rank_at(name: str, is_stack: bool, adapter: Adapter) -> tuple[int, float]:
    """(rank, alpha) of the weight at a path without `.weight`, after the patterns of the adapter."""
    rank, alpha = pattern_of(adapter.rank_pattern, name), pattern_of(adapter.alpha_pattern, name)
    usual = (adapter.expert_rank, adapter.expert_alpha) if is_stack else (adapter.rank, adapter.alpha)
    return (
        usual[0] if rank is None else adapter.rank_pattern[rank],
        usual[1] if alpha is None else adapter.alpha_pattern[alpha],
    )


def width(adapter: Adapter) -> int:
    """How many times its rank an adapter is wide: 2 where its other half subtracts what it began with."""
    return 2 if adapter.init in SUBTRACTING else 1


def depth(weights: list[Matrix]) -> int:
    """Decoder layers of a model."""
    return max(m.count for m in weights)


def paths(matrix: Matrix, weights: list[Matrix]) -> list[str]:
    """Where a weight stands in a model. Of those that not all layers have, experts are taken to be in the last ones."""
    layers = depth(weights)
    first = 0 if matrix.group == "dense" else max(0, layers - matrix.count)
    return [f"model.layers.{layer}.{matrix.name}" for layer in range(first, first + matrix.count)]


def ranks(matrix: Matrix, weights: list[Matrix], family: Family, adapter: Adapter) -> list[int]:
    """Widths of the LoRA updates of one kind of weight, layer by layer; empty where there are none."""
    kind = update_of(matrix, family, adapter)
    if not kind:
        return []
    return [width(adapter) * rank_at(path, kind == "stack", adapter)[0] for path in paths(matrix, weights)]


def trained_parameters(weights: list[Matrix], family: Family, adapter: Adapter) -> int:
    """Parameters that training changes: of the adapter, or with full fine-tuning of the base."""
    if adapter.method == "full":
        return total_parameters([m for m in weights if is_trained_whole(m, family, adapter)])
    return lora_parameters(weights, family, adapter)


def lora_parameters(weights: list[Matrix], family: Family, adapter: Adapter) -> int:
    """Trainable parameters, as stock PEFT makes them: rank x (in + out) per linear map, and per expert of a stack."""
    return sum(_lora(m, weights, family, adapter) * max(m.experts, 1) for m in weights)


def active_trained_parameters(weights: list[Matrix], family: Family, adapter: Adapter) -> int:
    """Parameters that training changes and one token is multiplied with."""
    if adapter.method == "full":
        return sum(m.active_parameters for m in weights if m.columns > 1 and is_trained_whole(m, family, adapter))
    return active_lora_parameters(weights, family, adapter)


def active_lora_parameters(weights: list[Matrix], family: Family, adapter: Adapter) -> int:
    """Trainable parameters that one token is multiplied with: those of its own experts only."""
    return sum(_lora(m, weights, family, adapter) * (m.active if m.experts else 1) for m in weights)


def _lora(matrix: Matrix, weights: list[Matrix], family: Family, adapter: Adapter) -> int:
    """Trainable parameters of one kind of weight, per expert: A, B, and with DoRA a length per row."""
    widths = ranks(matrix, weights, family, adapter)
    lengths = matrix.rows * len(widths) if adapter.method == "dora" else 0
    return sum(widths) * (matrix.rows + matrix.columns) + lengths


def is_large(group: Group) -> bool:
    """Whether a group holds linear maps and expert stacks, which are what memory is about."""
    return group in ("attention", "routed", "shared", "dense")


def is_4bit(matrix: Matrix, family: Family, adapter: Adapter) -> bool:
    """Whether a frozen weight is stored in 4 bits: expert stacks, and the linear maps that the family names."""
    named = matrix.name in {*family.attention, *family.shared, *family.dense}
    return adapter.load_in_4bit and matrix.columns > 1 and (matrix.experts > 0 or named)


def nf4_bytes(adapter: Adapter) -> float:
    """Bytes per parameter of what is stored in 4 bits."""
    return NF4_DOUBLE_BYTES if adapter.double_quantisation else NF4_BYTES


def weights_gib(model: Model) -> float:
    """Size of the weight files of the base in GiB: as published, else computed as bf16."""
    if model.download_gib > 0 and not model.tiny:
        return model.download_gib
    return total_parameters(matrices(model)) * BF16_BYTES / GIB


def merged_gib(model: Model) -> float:
    """Size of the merged weights in GiB, written as bf16."""
    return total_parameters(matrices(model)) * BF16_BYTES / GIB
