"""What did not learn, and whether there is an honest reason: `unlearnt(model)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from finetune.errors import NumbersError


class Heard:
    """How many rows with a gradient each expert got on this rank, as `Counted` wants it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def memory(self) -> dict[str, torch.Tensor]:
        """Path of an experts module -> counts (E,)."""
        found = {}
        for name, module in self._modules():
            counts = getattr(module, "finetune_heard", None)
            if counts is not None:
                found[name] = counts
        return found

    def add(self, memory: dict[str, torch.Tensor]) -> None:
        """Adds counts to those of the modules."""
        for name, module in self._modules():
            if name in memory:
                before = getattr(module, "finetune_heard", None)
                saved = memory[name].to(next(module.parameters()).device)
                module.finetune_heard = saved if before is None else before + saved

    def _modules(self) -> Iterator[tuple[str, Any]]:
        from finetune.experts import ExpertsLora

        adapted = {id(m.get_base_layer()) for m in self.model.modules() if isinstance(m, ExpertsLora)}
        return (
            (name, module)
            for name, module in self.model.named_modules()
            if id(module) in adapted or (hasattr(module, "finetune_layout") and _is_trained(module))
        )


def _is_trained(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _unchanged(model: Any, begun: Mapping[str, torch.Tensor]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """`unlearnt` for weights that are trained themselves: those whose bits are what they were."""
    from finetune.whole import fingerprints

    idle: dict[str, list[int]] = {}
    heard: dict[str, list[int]] = {}
    for name, now in fingerprints(model).items():
        same = (now == begun[name]).nonzero().flatten().tolist()
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not hasattr(module, "finetune_layout"):
            if same:
                raise NumbersError("TRN-002", f"{name} did not change", "", "a larger train.lr")
            continue
        counted = getattr(module, "finetune_heard", None)
        heard[path] = [0] * len(now) if counted is None else counted.tolist()
        wrong = [expert for expert in same if heard[path][expert]]
        if wrong:
            what = f"{leaf} of {path}: experts {wrong[:5]} got gradients and did not change"
            raise NumbersError(
                "TRN-004", what, f"expert {wrong[0]} got {heard[path][wrong[0]]} rows", "a larger train.lr"
            )
        if same:
            idle[name] = same
    return idle, heard


def unlearnt(
    model: Any, weights: Mapping[str, torch.Tensor], begun: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(stack -> experts whose update is still zero, experts module -> rows with a gradient that each expert got).

    `weights` are the trained parameters by name, whole. An expert that no row with a gradient reached is the one honest
    reason for an update of zero. `begun` are the fingerprints of a model that is trained itself. Layers of another
    engine do not count rows: their experts stand in the first only.
    Raises NumbersError: TRN-002 when a weight that every token uses did not change,
    TRN-004 when an expert that was reached did not.
    """
    from peft.tuners.lora import LoraLayer

    from finetune.adapters import without_update
    from finetune.experts import ExpertsLora

    if begun:
        return _unchanged(model, begun)
    idle: dict[str, list[int]] = {}
    heard: dict[str, list[int]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    stacks = {name: module for name, module in layers.items() if isinstance(module, ExpertsLora)}
    still = {
        name: without_update(module, weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"])
        for name, module in layers.items()
    }
    many = {name for name, module in layers.items() if getattr(module, "num_experts", 1) > 1}
    dead = [name for name in layers if name not in many and still[name]]
    if dead:
        raise NumbersError(
            "TRN-002", f"{len(dead)} adapted weights did not change, e.g. {dead[0]}", "", "a larger train.lr"
        )
    for name, module in stacks.items():
        rows = module.rows_with_a_gradient()
        silent = still[name]
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
    for name in many - stacks.keys():
        if still[name]:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            idle[f"{path}.{layers[name].parameter_name}"] = still[name]
    return idle, heard
