"""The pairs of expert stacks: which stack each belongs to, what is in and out, and the order of lora_B's columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.errors import AdapterError
from finetune.layouts.plain import (
    BY_EXPERT,
    BY_RANK,
    CONFIG,
    DETAIL,
    ORDER,
    PREFIX,
    A,
    AdapterFile,
    B,
    Update,
    Weight,
    foreign,
    targeted,
    update_of,
)

Layout = Literal["peft", "peft-0.18", "peft-0.19.0", "unsloth-before-2026-09-17"]
"""What a person can say of a folder that does not say it itself. `peft` is the present layout, since 0.19.1."""


def read_stacks(
    adapter: AdapterFile, pairs: dict[str, list[str]], weights: Mapping[str, Weight], layout: Layout | None
) -> tuple[list[Update], dict[str, torch.Tensor], list[str]]:
    """(updates, tensors, what was converted) of all expert stacks. Nothing is rounded: numbers only change places."""
    reading = _reading(adapter, pairs, weights, layout)
    order = [name for name in stack_names(weights)[next(iter(pairs))] if name in reading.names]
    updates: list[Update] = []
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, None] = {}
    for module, paths in pairs.items():
        for path, name in zip(paths, reading.names, strict=True):
            weight = weights[f"{module}.{name}"]
            a, b = adapter.tensors[PREFIX + path + A], adapter.tensors[PREFIX + path + B]
            standard = module + ".base_layer" * (len(order) - 1 - order.index(name))
            update = update_of(f"{module}.{name}", standard, adapter.config)
            experts, rank = weight.shape[0], update.rank
            if min(experts, rank) > 1 and _is_by_expert(adapter, name, layout):
                b = b.reshape(-1, experts, rank).mT.reshape(b.shape)
                said[f"columns of lora_B of {name} put from Unsloth's former order into PEFT's"] = None
            if reading.in_first != weight.is_transposed:
                # The update is A_e^T B_e^T one way and B_e A_e the other: the new A_e is B_e^T, the new B_e is A_e^T.
                a, b = (
                    b.reshape(-1, rank, experts).permute(2, 1, 0).reshape(experts * rank, -1),
                    a.reshape(experts, rank, -1).permute(2, 1, 0).reshape(-1, rank * experts),
                )
                said[f"in and out of {name} put from the layout before PEFT 0.19.1 into the present one"] = None
            if standard != path:
                said[f"pair of {name} moved: the stacks were wrapped in alphabetical order"] = None
            updates.append(update)
            tensors |= {PREFIX + standard + A: a.contiguous(), PREFIX + standard + B: b.contiguous()}
    return updates, tensors, list(said)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to understand the pairs of all expert stacks."""

    names: tuple[str, ...]
    """Stacks, deepest pair first."""
    in_first: bool
    """lora_A spans d1 of a stack (E, d1, d2), lora_B spans d2; otherwise the other way round."""


def stack_names(weights: Mapping[str, Weight]) -> dict[str, list[str]]:
    """Module -> names of its expert stacks, in the order of its parameters."""
    found: dict[str, list[str]] = {}
    for parameter, weight in weights.items():
        if len(weight.shape) == 3:
            module, _, name = parameter.rpartition(".")
            found.setdefault(module, []).append(name)
    return found


def deepest_first(paths: Iterable[str]) -> dict[str, list[str]]:
    """Module -> the paths of its pairs as PEFT nested them."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda path: -path.count(".base_layer")):
        found.setdefault(path.replace(".base_layer", ""), []).append(path)
    return found


def _reading(
    adapter: AdapterFile, pairs: dict[str, list[str]], weights: Mapping[str, Weight], layout: Layout | None
) -> _Reading:
    """The only reading that fits the base. Raises AdapterError ADP-011 without one, ADP-012 with several."""
    module = next(iter(pairs))
    targets = adapter.config.target_parameters or ()
    suffixes = {name: targeted(f"{module}.{name}", targets) for name in stack_names(weights)[module]}
    natural = tuple(name for name, found in suffixes.items() if found)
    orders = dict.fromkeys([natural, tuple(sorted(natural))])
    marked = next(weight.is_transposed for weight in weights.values() if len(weight.shape) == 3)
    # The present layout first: when nothing fits, its misfit is the one to report.
    candidates = [_Reading(names, in_first) for in_first in (marked, not marked) for names in orders]
    misfits = [_misfit(adapter, pairs, weights, reading) for reading in candidates]
    fitting = [reading for reading, misfit in zip(candidates, misfits, strict=True) if not misfit]
    if not fitting:
        raise foreign(adapter.folder, misfits[0])
    left = fitting
    if len(left) > 1:
        in_first = _wrote_in_first(adapter.values, layout, marked)
        left = [reading for reading in left if in_first is None or reading.in_first == in_first]
        # On a parametrised module PEFT matches full names only, so a shorter one means: in the order of parameters.
        if any(found != f"{module}.{name}" for name, found in suffixes.items() if found):
            left = [reading for reading in left if reading.names == natural]
    if len(left) != 1:
        raise _ambiguous(adapter.folder, left or fitting)
    return left[0]


def _misfit(adapter: AdapterFile, pairs: dict[str, list[str]], weights: Mapping[str, Weight], reading: _Reading) -> str:
    """Why a reading does not fit the base; empty when it does."""
    for module, paths in pairs.items():
        depths = [path.count(".base_layer") for path in paths]
        if depths != list(range(len(reading.names)))[::-1]:
            return f"{module} has {len(paths)} pairs and target_parameters names {len(reading.names)} of its stacks"
        for path, name in zip(paths, reading.names, strict=True):
            weight = weights[f"{module}.{name}"]
            _, first, second = weight.shape
            inputs, outputs = (first, second) if reading.in_first else (second, first)
            rank = update_of(f"{module}.{name}", path, adapter.config).rank
            wanted = (rank * weight.shape[0], inputs), (outputs, rank * weight.shape[0])
            given = tuple(tuple(adapter.tensors[PREFIX + path + end].shape) for end in (A, B))
            if given != wanted:
                needs = f"{name} with {weight.shape[0]} experts and rank {rank} takes {wanted[0]} and {wanted[1]}"
                return f"{path} has lora_A {given[0]} and lora_B {given[1]}, but {needs}"
    return ""


def _wrote_in_first(values: Mapping[str, Any], layout: Layout | None, marked: bool) -> bool | None:
    """Whether the program that wrote a file let lora_A span d1, by its owner's word or `peft_version`; None if unknown.

    0.19.0 and development versions tell nothing: transformers 5.0 to 5.5 changed PEFT's rule in some processes.
    """
    stated = {"peft": marked, "peft-0.18": True, "peft-0.19.0": not marked}
    if layout in stated:
        return stated[layout]
    number = re.match(r"(\d+)\.(\d+)\.(\d+)$", str(values.get("peft_version")))
    version = tuple(map(int, number.groups())) if number else (0, 19, 0)
    return None if version == (0, 19, 0) else True if version < (0, 19, 0) else marked


def _ambiguous(folder: Path, readings: list[_Reading]) -> AdapterError:
    if len({reading.names for reading in readings}) > 1:
        what = f"{folder}: the pairs of {' and '.join(readings[0].names)} could be either's, for their shapes agree"
        why = f"{CONFIG} does not tell in which order PEFT wrapped the stacks"
        how = "give the file's target_parameters by their ends (mlp.experts.NAME) if the experts were not parametrised"
        return AdapterError("ADP-012", what, why, how)
    what = f"{folder}: in and out of {' and '.join(readings[0].names)} have one size, and PEFT 0.19 exchanged them"
    how = f"{_command(folder, 'peft-0.18')} for PEFT 0.17 and 0.18, --from peft-0.19.0, or --from peft for a later one"
    return AdapterError("ADP-012", what, f"{CONFIG} has no peft_version that tells", how)


def _command(folder: Path, layout: Layout) -> str:
    return f"python -m finetune.layouts {folder} TARGET --from {layout} --base FOLDER_OF_THE_BASE"


def _is_by_expert(adapter: AdapterFile, name: str, layout: Layout | None) -> bool:
    """Whether lora_B of stack `name` is in Unsloth's former order. Raises AdapterError ADP-013 where nothing tells."""
    values, folder = adapter.values, adapter.folder
    mapping = values.get("auto_mapping")
    sources = [values, mapping if isinstance(mapping, dict) else {}]
    said = [_said_order(source, name) for source in sources]
    order = next((order for order in said if order), None)
    stated = None if layout is None else BY_EXPERT if layout == "unsloth-before-2026-09-17" else BY_RANK
    if stated and order in (BY_RANK, BY_EXPERT) and stated != order:
        what = f"{folder} says {ORDER}={order} of {name}"
        raise AdapterError("ADP-013", what, f"that is not the order of --from {layout}", "the layout it states")
    if order in (BY_RANK, BY_EXPERT) or stated:
        return (stated or order) == BY_EXPERT
    if order or any(source.get("unsloth_fixed") or source.get(DETAIL) for source in sources):
        what = f"{folder} was written by Unsloth and does not say how the columns of lora_B of {name} are ordered"
        why = "before 2026-09-17 (unsloth_zoo 2026.9.6) it was not PEFT's order, and the files look the same"
        how = f"{_command(folder, 'unsloth-before-2026-09-17')}, or --from peft if a later one trained it"
        raise AdapterError("ADP-013", what, why, how)
    return False


def _said_order(source: Mapping[str, Any], name: str) -> str | None:
    """What Unsloth noted of one stack: the order, another word for something unknown, or None."""
    detail = source.get(DETAIL)
    if detail is None:
        return None if source.get(ORDER) is None else str(source[ORDER])
    try:
        return str(detail["parameters"][name][ORDER])
    except (KeyError, TypeError):
        return "unknown"
