"""Training with Unsloth's kernels: `take_over` before transformers is imported, then `load`. Nothing else imports it.

Importing Unsloth (2026.10.5) replaces functions and classes of transformers, trl and peft for the rest of the process,
and mends files of some other packages on disk. So it happens in a process that only trains (`launch` starts one). What
comes back is held to the same contract as our own layers: PEFT's layout, exactly the weights that were asked for, and
experts really in 4 bits. Unsloth is under Apache-2.0, its zoo under LGPL-3.0-or-later, its MoE parts under AGPL-3.0.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import collecting
from finetune.engine import engine_unfit
from finetune.errors import NumbersError, RunError
from finetune.families import Family
from finetune.recipe import Recipe

PATCHED = ("transformers", "trl", "peft")
"""What Unsloth must be imported before."""
UNTOUCHED = "UNSLOTH_IGNORED_TOKENIZER_NAMES"
"""Variable with the base whose embeddings its trainer leaves as they are. It overwrites rows that it takes for
untrained, and the merge, which goes by the files, would not know."""


def take_over(scratch: Path) -> None:
    """Imports Unsloth, offline and without its statistics; the code that it generates goes below `scratch`.

    Raises RunError (ENG-006) where a library that it changes is imported already, or where it does not import.
    """
    before = [name for name in PATCHED if name in sys.modules]
    if before and "unsloth" not in sys.modules:
        raise RunError(
            "ENG-006",
            f"{before[0]} was imported before Unsloth, which replaces parts of it",
            "training with Unsloth needs a process of its own",
            "python -m finetune train run=PATH, which starts one",
        )
    os.environ.update(environment(scratch))
    try:
        import unsloth  # noqa: F401  # for what it does to the libraries above
    except Exception as error:  # on a machine that does not suit it, it raises whatever its first call meets
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "the extra [unsloth] with a torch for CUDA, or engine=finetune in a new run"
        raise RunError("ENG-006", "Unsloth cannot be imported here", text, fix) from error


def environment(scratch: Path) -> dict[str, str]:
    """What Unsloth reads from the environment when it is imported."""
    return {
        "UNSLOTH_DISABLE_STATISTICS": "1",  # it would fetch a marker file per kind of machine
        "HF_HUB_OFFLINE": "1",  # the base is a folder by now, whatever `network` says
        "TRANSFORMERS_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth"),  # else a folder where the command was typed
        "UNSLOTH_MOE_LORA_B_LAYOUT": "rank_major",  # PEFT's; the other one is Unsloth's before 2026-09-17
    }


def load(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """(Base, its PEFT model with a new adapter), as `load_base` and `attach` would give them. After `take_over`.

    Raises WeightsError for a folder that Unsloth would read otherwise, NumbersError (ADP-010, ENG-007) when other
    weights are adapted than asked for, or are not in 4 bits.
    """
    from transformers import AutoTokenizer
    from unsloth import FastModel

    from finetune.adapters import check_coverage, to_fp32
    from finetune.adapters.targets import present
    from finetune.base import Base, Peak, read_config, resident_gib, stored_bytes

    family, config = read_config(folder)
    if wrong := engine_unfit(recipe, folder, config.to_dict()):
        raise wrong
    os.environ[UNTOUCHED] = str(folder)
    collecting.as_usual()
    started, before = time.monotonic(), resident_gib()
    with Peak() as peak:
        model, _ = FastModel.from_pretrained(**loading(recipe, folder))
    base = Base(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),  # theirs may have other tokens
        family=family,
        folder=folder,
        load_seconds=time.monotonic() - started,
        load_peak_gib=peak.gib - before,
        largest_group_gib=0.0,
        resident_gib=sum(map(stored_bytes, [*model.parameters(), *model.buffers()])) / 2**30,
    )
    attention = list(present(model, family.attention))
    model = FastModel.get_peft_model(model, **adapting(recipe, family, attention))
    to_fp32(model)
    check_coverage(model, family, recipe.adapter)
    if recipe.adapter.load_in_4bit:
        require_4bit(model, family)
    return base, model


def loading(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What `FastModel.from_pretrained` is given."""
    import torch

    return {
        "model_name": str(folder),
        "max_seq_length": recipe.data.max_length,
        "dtype": torch.bfloat16,
        "load_in_4bit": recipe.adapter.load_in_4bit,
        "load_in_8bit": False,
        "load_in_16bit": not recipe.adapter.load_in_4bit,
        "full_finetuning": False,
        "device_map": {"": 0},
        "fix_tokenizer": False,
        "trust_remote_code": False,
        "use_gradient_checkpointing": recompute(recipe),
        "use_exact_model_name": True,  # else a name it knows is replaced by a quantised upload of its own
        "offload_embedding": False,
        "fast_inference": False,
        "random_state": recipe.seed,
        "local_files_only": True,
    }


def adapting(recipe: Recipe, family: Family, attention: list[str]) -> dict[str, Any]:
    """What `FastModel.get_peft_model` is given, to adapt what the settings name; `attention` are the maps it has.

    Names have a dot: a bare `down_proj` would make Unsloth adapt the experts too.
    """
    from finetune.adapters.targets import target_parameters

    adapter = recipe.adapter
    stacks, _ = target_parameters(family, adapter)
    dense = family.dense if adapter.targets == "all" else ()
    return {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": [*attention, *dense],
        "target_parameters": stacks or None,
        "rank_pattern": {re.escape(name): adapter.expert_rank for name in stacks},
        "alpha_pattern": {re.escape(name): adapter.expert_alpha for name in stacks},
        "use_gradient_checkpointing": recompute(recipe),
        "random_state": recipe.seed,
    }


def recompute(recipe: Recipe) -> str | bool:
    """Unsloth's word for recomputing activations in all layers, which keeps their inputs in host memory, or False."""
    return "unsloth" if recipe.train.gradient_checkpointing else False


def for_trainer(recipe: Recipe) -> Recipe:
    """The recipe as TRL is told it: Unsloth has switched recomputing on itself, and TRL's switch would undo that."""
    return replace(recipe, train=replace(recipe.train, gradient_checkpointing=False))


def require_4bit(model: Any, family: Family) -> None:
    """Nothing, or NumbersError (ENG-007) when an adapted weight or an expert stack is not in 4 bits.

    Unsloth leaves a stack whose layer it does not know in 16 bits and says so in a log at most.
    """
    from finetune.adapters import adapted_parameters
    from finetune.adapters.coverage import measure, plain_path

    adapted = adapted_parameters(model)
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = plain_path(f"{path}.{name}")
            if ".lora_" in path or not (plain in adapted or family.group_of(plain) == "routed"):
                continue
            if not measure(module, name, parameter)[1]:
                found.append(plain)
    if found:
        raise NumbersError(
            "ENG-007",
            f"Unsloth left {len(found)} weights in 16 bits, e.g. {found[0]}",
            "adapter.load_in_4bit=true asks for 4",
            "engine=finetune, or adapter.load_in_4bit=false, in a new run",
        )
