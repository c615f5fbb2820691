"""Adapter folders in one layout, PEFT's since 0.19.1: other layouts are converted exactly or refused by name.

An adapter of a stack of E experts with rank r is two matrices: lora_A (E*r, in) with the expert as the slow row index,
lora_B (out, r*E) with the expert as the fast column index. The update of expert e is B_e A_e (out, in). Programs differ
in what they call in and out, in which stack's pair lies under `base_layer`, and in the order of lora_B's columns:

- PEFT 0.17 and 0.18 take a stack (E, d1, d2) as (E, in, out). Since 0.19.1 it is (E, out, in) unless its module says
  `is_transposed`; 0.19.0 had that the wrong way round (commit 5356277d0, peft#3165). Shapes tell, and where d1 = d2
  `peft_version`, which PEFT writes since 0.18.
- PEFT wraps the stacks of a module in the order of its parameters, of a parametrised module (4-bit experts by
  bitsandbytes) in alphabetical order; the first lies deepest. Shapes tell.
- Unsloth before 2026-09-17 (unsloth_zoo 2026.9.6) ordered lora_B's columns by expert (unsloth#6930, unsloth-zoo#1269).
  Shapes do not tell. Since then it writes `lora_B_layout` (unsloth-zoo#1232); without it somebody has to say:

    python -m finetune.layouts FOLDER TARGET --from unsloth-before-2026-09-17 --base FOLDER_OF_THE_BASE
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.base import read_config
from finetune.errors import AdapterError
from finetune.families import Family
from finetune.layouts.plain import (
    BY_RANK,
    CONFIG,
    DETAIL,
    LENGTHS,
    ORDER,
    PREFIX,
    WEIGHTS,
    A,
    AdapterFile,
    B,
    Weight,
    check_matrix,
    foreign,
    paths_of,
    plain_config,
    read_adapter_config,
    read_tensors,
    update_of,
)
from finetune.layouts.stacks import Layout, deepest_first, read_stacks, stack_names
from finetune.rundir import atomic_folder, write_json

__all__ = ["LENGTHS", "PREFIX", "A", "AdapterError", "B", "Layout", "adaptable", "convert", "foreign", "read_adapter"]


def read_adapter(folder: Path, weights: Mapping[str, Weight], layout: Layout | None = None) -> AdapterFile:
    """The adapter in `folder`, fitted to a base of these `weights` (see `adaptable`). `layout` is what its owner says.

    Raises AdapterError: ADP-011 it belongs to another base, ADP-012 and ADP-013 its layout is ambiguous, ADP-014 its
    layout is known and not read here, ADP-015 files are missing or damaged, ADP-016 it is more than plain LoRA or DoRA.
    """
    values = read_adapter_config(folder)
    adapter = AdapterFile(folder, values, plain_config(folder, values), read_tensors(folder))
    paths = paths_of(adapter, weights)
    modules = stack_names(weights)
    pairs = deepest_first(path for path, module in paths.items() if module in modules)
    for path, module in paths.items():
        if module in pairs:
            continue
        update = update_of(f"{module}.weight", path, adapter.config)
        if update.parameter in weights:  # what the base lacks, loading and merging say
            check_matrix(adapter, update, weights[update.parameter])
        adapter.updates.append(update)
    if pairs and adapter.config.use_dora:
        what = f"{folder} applies DoRA to expert stacks, e.g. {next(iter(pairs))}"
        raise AdapterError("ADP-016", what, "PEFT has no such adapter", "an adapter that PEFT trained")
    if pairs:
        updates, tensors, adapter.converted = read_stacks(adapter, pairs, weights, layout)
        old = {PREFIX + path + end for paths in pairs.values() for path in paths for end in (A, B)}
        adapter.tensors = {key: tensor for key, tensor in adapter.tensors.items() if key not in old} | tensors
        adapter.updates += updates
    adapter.updates.sort(key=lambda update: update.key)
    for sentence in adapter.converted:  # nothing is changed silently
        logging.getLogger(__name__).warning("%s: %s", folder, sentence)
    return adapter


def convert(folder: Path, target: Path, layout: Layout, base: Path) -> AdapterFile:
    """Writes the adapter in `folder`, whose owner says that it has this `layout`, as a standard PEFT folder.

    `base` is the folder of its base; only config.json is read. Raises AdapterError as `read_adapter` does.
    """
    import transformers
    from peft import __version__
    from safetensors.torch import save_file

    if target.exists():
        raise AdapterError("ADP-015", f"{target} exists already", "nothing is overwritten", "another name")
    family, config = read_config(base)
    with torch.device("meta"):
        model = getattr(transformers, family.auto_class).from_config(config)
    adapter = read_adapter(folder, adaptable(model, family), layout)
    values = {key: value for key, value in adapter.values.items() if key not in (ORDER, DETAIL)}
    if values.get("auto_mapping"):  # where Unsloth's mark is; beside it Unsloth and we look for the order
        values["auto_mapping"] = {k: v for k, v in values["auto_mapping"].items() if k != DETAIL} | {ORDER: BY_RANK}
    with atomic_folder(target) as partial:
        save_file(adapter.tensors, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, values | {"peft_version": __version__})
    return adapter


def adaptable(model: Any, family: Family) -> dict[str, Weight]:
    """Name -> weight, of every expert stack and matrix of a model without adapters, packed or not, or on `meta`."""
    found: dict[str, Weight] = {}
    for path, module in model.named_modules():
        if family.experts and path.endswith("." + family.experts):
            mark = bool(getattr(module, "is_transposed", False))
            for name in family.expert_parameters:
                packed = hasattr(module, "finetune_layout")
                shape = module.finetune_layout.shapes[name] if packed else getattr(module, name).shape
                found[f"{path}.{name}"] = Weight(tuple(shape), mark)
        elif isinstance(module, torch.nn.Linear):  # packed ones included: their weight has another shape
            found[f"{path}.weight"] = Weight((module.out_features, module.in_features))
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            found[f"{path}.weight"] = Weight(tuple(module.weight.shape))
    return found
