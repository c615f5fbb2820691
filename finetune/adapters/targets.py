"""Which weights LoRA goes to, and PEFT's settings for that: `lora_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from finetune import sizes
from finetune.base import Base
from finetune.errors import RecipeError
from finetune.experts import ExpertsLora
from finetune.families import Family
from finetune.families.family import LAYER
from finetune.recipe import Adapter


def lora_config(base: Base, adapter: Adapter, given: Mapping[str, int] | None = None) -> LoraConfig:
    """PEFT's settings for an adapter, with explicit paths below the decoder layer and never "all-linear".

    `given` are the ranks of weights that have one of their own, by path; a weight of rank 0 gets no update.
    """
    given = given or {}
    stacks, matrices = target_parameters(base.family, adapter)
    ranks, alphas = patterns(base.model, base.family, adapter, given)
    modules = present(base.model, target_modules(base.family, adapter))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank * sizes.width(adapter),
        lora_alpha=scaled(adapter.alpha, adapter),  # PEFT divides it by the rank; a fraction is fine
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.rslora,
        # What PEFT's other ways to begin do to the base or cannot do to stacks and 4 bits is done in `initial`.
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        target_modules=list(but_without_rank(modules, given)),
        target_parameters=[*stacks, *but_without_rank(matrices, given, ".weight")] or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    register_layers(config, base)
    return config


def but_without_rank(names: Iterable[str], given: Mapping[str, int], end: str = "") -> Iterator[str]:
    """The names, each as it is or, where a layer's is given rank 0, those of the other layers one by one."""
    for name in names:
        found = {path: rank for path, rank in given.items() if path.endswith("." + name.removesuffix(end))}
        if 0 in found.values():
            yield from (f"{path}{end}" for path, rank in found.items() if rank)
        else:
            yield name


def scaled(alpha: float, adapter: Adapter) -> float:
    """The alpha that means the same scale when the file is `sizes.width` times as wide as the rank."""
    width = sizes.width(adapter)
    return alpha * (width**0.5 if adapter.rslora else width)


def patterns(
    model: nn.Module, family: Family, adapter: Adapter, given: Mapping[str, int] | None = None
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's (rank_pattern, alpha_pattern): of weights that differ from `adapter.rank` and `adapter.alpha`.

    PEFT sorts them when it saves, so no two of ours fit the same weight. Raises RecipeError (ADP-005) for a pattern of
    the user's that fits none.
    """
    found: dict[str, dict[str, tuple[int, float]]] = {}
    used: set[str | None] = set()
    names, (stacks, matrices) = wanted_names(family, adapter), target_parameters(family, adapter)
    for path, _ in model.named_parameters():
        match = LAYER.search(path)
        if not match or match[2] not in names:
            continue
        name = path.removesuffix(".weight")
        used |= {sizes.pattern_of(given, name) for given in (adapter.rank_pattern, adapter.alpha_pattern)}
        target = match[2] if match[2] in (*stacks, *matrices) else match[2].removesuffix(".weight")
        rank, alpha = sizes.rank_at(name, match[2] in stacks, adapter)
        if given and name in given:
            rank, alpha = given[name], alpha * given[name] / rank  # the same scale
        if rank:
            found.setdefault(target, {})[match[1]] = (rank, alpha)
    unused = [key for key in (*adapter.rank_pattern, *adapter.alpha_pattern) if key not in used]
    if unused:
        why = "no adapted weight's path ends so. Write the end of one, such as self_attn.q_proj."
        raise RecipeError([f"ADP-005 {key} in adapter.rank_pattern or alpha_pattern: {why}" for key in unused])
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, layers in found.items():
        same = len(set(layers.values())) == 1 and not given
        for layer, (rank, alpha) in layers.items():
            key = re.escape(target) if same else re.escape(f"layers.{layer}.{target}")
            if rank != adapter.rank:
                ranks[key] = rank * sizes.width(adapter)
            if alpha != adapter.alpha:
                alphas[key] = scaled(alpha, adapter)
    return ranks, alphas


def target_modules(family: Family, adapter: Adapter) -> tuple[str, ...]:
    """The maps that an adapter names as modules."""
    return family.attention + (family.dense if adapter.targets == "all" and not family.experts else ())


def target_parameters(family: Family, adapter: Adapter) -> tuple[list[str], list[str]]:
    """(expert stacks, other weights) that an adapter names as parameters rather than as modules.

    Shared and dense MLPs of families with experts are named so because PEFT redirects every *module* whose name ends in
    gate_proj, up_proj or down_proj to the routed experts of some, full paths included (peft 0.21.2,
    utils/transformers_weight_conversion.py). On disk the keys are the ordinary ones.
    """
    stacks = [f"{family.experts}.{name}" for name in family.expert_parameters] if family.experts else []
    if adapter.targets == "attention":
        stacks = []
    moe = adapter.targets == "all" and family.experts
    others = [f"{name}.weight" for name in family.shared + family.dense] if moe else []
    if adapter.router and family.router:
        others.append(f"{family.router}.weight")
    return stacks, others


def wanted_names(family: Family, adapter: Adapter) -> set[str]:
    """Paths below the decoder layer of the parameters that the settings ask to adapt."""
    stacks, others = target_parameters(family, adapter)
    return {f"{name}.weight" for name in target_modules(family, adapter)} | set(stacks) | set(others)


def present(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Those of `names` that at least one decoder layer has."""
    have = {match[2] for path, _ in model.named_modules() if (match := LAYER.search(path))}
    return (name for name in names if name in have)


def register_layers(config: LoraConfig, base: Base) -> None:
    """Tells PEFT which layer class adapts expert stacks, and that a linear map named by its weight is a linear map."""
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    def linear(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
        if kwargs.pop("parameter_name", None) != "weight":
            return None  # targeted as a module: PEFT's own dispatch
        if type(target) is nn.Linear:
            return LoraLinear(target, adapter_name, config=config, **kwargs)
        if isinstance(target, bnb.nn.Linear4bit):
            extra = {
                "compute_dtype": target.compute_dtype,
                "compress_statistics": target.weight.compress_statistics,
                "quant_type": target.weight.quant_type,
            }
            return LoraLinear4bit(target, adapter_name, config=config, **(kwargs | extra))
        return None

    classes: dict[Any, Any] = {nn.Linear: linear}
    for module in base.model.modules():
        if hasattr(module, "finetune_layout"):
            classes[type(module)] = ExpertsLora
    config._register_custom_module(classes)
