"""What did not learn, and whether there is an honest reason: `unlearnt(model)`."""

from __future__ import annotations

from typing import Any

from finetune.errors import NumbersError


def unlearnt(model: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(stack -> experts whose update is still zero, experts module -> rows with a gradient that each expert got).

    An expert that no such row reached is the one honest reason for an update of zero. Raises NumbersError: TRN-002 when
    a weight that every token uses did not change, TRN-004 when an expert that was reached did not.
    """
    from peft.tuners.lora import LoraLayer

    from finetune.adapters import without_update
    from finetune.experts import ExpertsLora

    idle: dict[str, list[int]] = {}
    heard: dict[str, list[int]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    stacks = {name: module for name, module in layers.items() if isinstance(module, ExpertsLora)}
    dead = [name for name, module in layers.items() if name not in stacks and without_update(module)]
    if dead:
        raise NumbersError(
            "TRN-002", f"{len(dead)} adapted weights did not change, e.g. {dead[0]}", "", "a larger train.lr"
        )
    for name, module in stacks.items():
        rows = module.rows_with_a_gradient()
        silent = without_update(module)
        wrong = [expert for expert in silent if rows[expert]]
        if wrong:
            raise NumbersError(
                "TRN-004",
                f"{module.parameter_name} of {name}: experts {wrong[:5]} got gradients and did not change",
                f"expert {wrong[0]} got {rows[wrong[0]]} rows",
                "a larger train.lr",
            )
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        heard[path] = rows
        if silent:
            idle[f"{path}.{module.parameter_name}"] = silent
    return idle, heard
