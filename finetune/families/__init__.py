"""The model families: one file each beside this one. `family_of(config)` finds the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import WeightsError
from finetune.families import (
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    glm4_moe,
    gpt_oss,
    granitemoe,
    internlm,
    llama,
    llama4,
    mistral4,
    mixtral,
    olmoe,
    qwen3,
    qwen3_5_moe,
    qwen3_moe,
)
from finetune.families.family import GROUPS, Family, Group, Matrix

_MODULES = (
    llama4,
    deepseek_v3,
    deepseek_v32,
    deepseek_v4,
    mistral4,
    qwen3_moe,
    qwen3_5_moe,
    gpt_oss,
    glm4_moe,
    mixtral,
    olmoe,
    granitemoe,
    llama,
    qwen3,
)

FAMILIES: dict[str, Family] = {module.FAMILY.key: module.FAMILY for module in _MODULES}
"""Every family by its key."""

__all__ = ["FAMILIES", "GROUPS", "Family", "Group", "Matrix", "family_of"]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by the model type of its text part, else by its own.

    Raises WeightsError: FAM-001 when no family knows the model type, FAM-002 when a folder of that type must be
    converted first.
    """
    for family in FAMILIES.values():
        if {family.text_part(config).get("model_type"), config.get("model_type")} & set(family.model_types):
            return family
    own = config.get("model_type")
    if own in internlm.NEEDS_CONVERSION:
        raise WeightsError(
            "FAM-002",
            f"model_type {own!r} in config.json needs another layout",
            "transformers has no class for it, and code that comes with weights is never run here",
            internlm.NEEDS_CONVERSION[own],
        )
    known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.model_types))
    raise WeightsError(
        "FAM-001",
        f"model_type {own!r} in config.json belongs to no family",
        f"known model types: {known}",
        "a base model of one of these, or a new file in finetune/families/",
    )
