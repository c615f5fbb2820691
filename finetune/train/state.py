"""What a training is between two updates, as bytes and back: tensors as safetensors, everything else as JSON beside.

A nested value of dicts, lists, tuples, numbers, texts and tensors becomes one safetensors file; its shape stands in the
file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

TREE = "tree"
"""Metadata key of the JSON that says where each tensor belongs."""


def to_bytes(value: Any) -> bytes:
    """A nested value as the bytes of a safetensors file. Raises TypeError on what it cannot hold."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    tree = _shape(value, tensors, names)
    return save(tensors, {TREE: json.dumps(tree)})


def from_file(path: Path) -> Any:
    """The nested value in a file that `to_bytes` made; tensors on the CPU."""
    with safe_open(path, "pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file, no dict
        return _value(json.loads(file.metadata()[TREE]), tensors)


def _shape(value: Any, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        if id(value) not in names:  # optimizers in 8 bits share tensors between parameters
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = value.detach().cpu().contiguous().clone()
        return {"tensor": names[id(value)]}
    if isinstance(value, np.ndarray):
        name = f"array{len(tensors)}"
        tensors[name] = torch.from_numpy(value.astype(np.int64))
        return {"array": name, "type": str(value.dtype)}
    if isinstance(value, dict):
        return {"dict": [[_shape(k, tensors, names), _shape(v, tensors, names)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_shape(item, tensors, names) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training state cannot hold a {type(value).__name__}")


def _value(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "array" in tree:
        return tensors[tree["array"]].numpy().astype(tree["type"])
    if "dict" in tree:
        return {_value(k, tensors): _value(v, tensors) for k, v in tree["dict"]}
    kind, items = next(iter(tree.items()))
    made = [_value(item, tensors) for item in items]
    return tuple(made) if kind == "tuple" else made


def drawn() -> dict[str, Any]:
    """The states of all random generators of this process: Python's, numpy's, torch's, and the current GPU's."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # the global generator is what libraries draw from
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def draw_on(state: dict[str, Any]) -> None:
    """Goes on drawing from states that `drawn` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or all of one whose parts lie with several processes. Every process must call it."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or a copy of one that is a piece of a larger one, as DeepSpeed makes of weights."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """`value` in the type, place and distribution of a parameter of the same shape."""
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device, parameter.dtype)
    from torch.distributed.tensor import distribute_tensor

    whole_value = value.to(parameter.device_mesh.device_type, parameter.dtype)
    return distribute_tensor(whole_value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Name -> parameter that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state_dict with whole tensors. Every process must call it."""
    state: dict[str, Any] = dict(optimizer.state_dict())  # what is nested in it is the optimizer's own
    state["state"] = {
        number: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` gave; of distributed parameters each process takes its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape and value.dim():
                values[name] = like(value, parameters[number]) if value.is_floating_point() else value
    optimizer.load_state_dict(state)
