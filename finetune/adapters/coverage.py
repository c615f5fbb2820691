"""The coverage table: what is packed, what is adapted, and the proof that it is what was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.adapters.targets import wanted_names
from finetune.errors import NumbersError
from finetune.experts import nf4
from finetune.experts.stack import is_packed
from finetune.families import GROUPS, Family, Group
from finetune.families.family import LAYER
from finetune.recipe import Adapter


@dataclass(slots=True)
class CoverageRow:
    """One line of the coverage table: what a group holds, how it is stored, and how much of it is adapted."""

    group: Group
    """Where the weights belong."""
    parameters: int
    """Parameters of the base, counted unpacked."""
    bytes: int
    """Bytes they take in memory, 4-bit maxima included."""
    parameters_4bit: int
    """How many of them are really stored in 4 bits."""
    adapted: int
    """How many of them have an adapter beside them, or are trained themselves."""
    trainable: int
    """Parameters of these adapters, or those trained themselves."""


def coverage(model: nn.Module, family: Family) -> list[CoverageRow]:
    """The coverage table of a model, with or without an adapter: one row per group that the model has."""
    rows = {group: CoverageRow(group, 0, 0, 0, 0, 0) for group in GROUPS}
    adapted = adapted_parameters(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied weights count once
                continue
            seen.add(id(parameter))
            plain = plain_path(f"{path}.{name}")
            row = rows[family.group_of(plain)]
            if ".lora_" in f".{path}.{name}":
                row.trainable += parameter.numel() if parameter.requires_grad else 0
                continue
            count, packed, size = measure(module, name, parameter)
            row.parameters += count
            row.bytes += size
            row.parameters_4bit += count if packed else 0
            row.adapted += count if plain in adapted or parameter.requires_grad else 0
            row.trainable += count if parameter.requires_grad else 0
    return [row for row in rows.values() if row.parameters]


def coverage_table(model: nn.Module, family: Family) -> list[dict[str, Any]]:
    """`coverage` as plain values for train.json."""
    return [asdict(row) for row in coverage(model, family)]


def measure(module: Any, name: str, parameter: torch.Tensor) -> tuple[int, bool, int]:
    """(logical parameters, whether stored in 4 bits, bytes) of one parameter of a module."""
    size = parameter.numel() * parameter.element_size()
    if hasattr(module, "finetune_layout") and name in module.finetune_layout.shapes and is_packed(module, name):
        experts, rows, columns = module.finetune_layout.shapes[name]
        return experts * rows * columns, True, size
    if hasattr(module, "finetune_layout") and name.endswith(nf4.SUFFIXES):
        return 0, True, size
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel(), True, size + state.absmax.numel() * state.absmax.element_size()
    return parameter.numel(), False, size


def adapted_parameters(model: nn.Module) -> set[str]:
    """Plain paths of the frozen parameters that have an adapter beside them."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = getattr(module, "parameter_name", "weight")
            found.add(f"{plain_path(path)}.{name}")
    return found


def plain_path(path: str) -> str:
    """A path inside a PEFT model as it is in the bare one."""
    path = path.removeprefix("base_model.model.").replace(".base_layer", "")
    return re.sub(r"\.lora_(A|B|magnitude_vector)\.[^.]+", "", path)


def wanted_parameters(model: nn.Module, family: Family, adapter: Adapter) -> set[str]:
    """Plain paths of the parameters that the settings ask to adapt, found from the model's own names."""
    names = wanted_names(family, adapter)
    found = set()
    for path, _ in model.named_parameters():
        plain = plain_path(path)
        match = LAYER.search(plain)
        if match and match[2] in names:
            found.add(plain)
    return found


def check_coverage(model: nn.Module, family: Family, adapter: Adapter, left_out: Collection[str] = ()) -> None:
    """Raises NumbersError (ADP-010) unless exactly the asked weights are adapted and nothing else is trainable.

    `left_out` are paths of maps that EVA gives no rank.
    """
    wanted, have = wanted_parameters(model, family, adapter), adapted_parameters(model)
    wanted -= {f"{path}.weight" for path in left_out}
    if wanted != have or not have:
        missing, extra = sorted(wanted - have), sorted(have - wanted)
        raise NumbersError(
            "ADP-010",
            f"adapter.targets={adapter.targets} asks for {len(wanted)} weights and {len(have)} are adapted",
            f"without an adapter: {missing[:3]}; not asked for: {extra[:3]}",
            "a family file that names the layers of this model",
        )
    stray = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if stray:
        raise NumbersError(
            "ADP-010", f"{len(stray)} weights outside the adapter would be trained", stray[0], "report this"
        )


def print_coverage(table: list[dict[str, Any]], console: Any) -> None:
    """Prints the coverage table and, in words, which groups are not in 4 bits."""
    from rich.table import Table

    view = Table(title="What is frozen in 4 bits and what is trained")
    for column in ("group", "parameters", "MiB", "really 4-bit", "adapted", "trained"):
        view.add_column(column, justify="left" if column == "group" else "right")
    for row in table:
        view.add_row(
            row["group"],
            f"{row['parameters']:,}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['parameters_4bit'] / row['parameters']:.0%}",
            f"{row['adapted'] / row['parameters']:.0%}",
            f"{row['trainable']:,}",
        )
    console.print(view)
