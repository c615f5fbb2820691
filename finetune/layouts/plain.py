"""An adapter folder as far as it is plain LoRA or DoRA in safetensors; the rest is refused with a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from finetune.errors import AdapterError
from finetune.foreign import check_folder
from finetune.foreign.headers import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
LENGTHS = ".lora_magnitude_vector"
"""DoRA's third part: the length of each row of the sum."""
ORDER, DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
"""Keys under which Unsloth notes the order of lora_B's columns, for all stacks and for each."""
BY_RANK, BY_EXPERT = "rank_major", "grouped_by_expert"
"""Unsloth's words for PEFT's order and for its own former one."""
NOT_PLAIN = (
    *("lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "fan_in_fan_out"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
    *("monteclora_config", "megatron_config"),
)
"""Settings with which an adapter is more than an update B A of frozen weights, or that with lengths (DoRA)."""
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base as it is. PiSSA and its kin train against a base of their own."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the base that an adapter can sit beside."""

    shape: tuple[int, ...]
    """(out, in) of a linear map, (E, d1, d2) of a stack, as stored in the unpacked model."""
    is_transposed: bool = False
    """The module of the stack says `is_transposed`; PEFT goes by this mark alone."""


@dataclass(frozen=True, slots=True)
class Update:
    """The adapter of one weight: W + `scale` B A, with DoRA every row of it brought to a length of its own."""

    parameter: str
    """The weight's name in the base."""
    key: str
    """Its path in the file, without `.lora_A.weight`."""
    rank: int
    """Width of B and height of A, for one expert."""
    scale: float
    """The factor of the product."""


@dataclass(slots=True)
class AdapterFile:
    """A plain LoRA or DoRA adapter in PEFT's layout since 0.19.1."""

    folder: Path
    """Where it came from."""
    values: dict[str, Any]
    """Its adapter_config.json as it was."""
    config: Any
    """Its LoraConfig."""
    tensors: dict[str, torch.Tensor]
    """Its matrices by their keys in the file."""
    updates: list[Update] = field(default_factory=list)
    """Its updates, sorted by key."""
    converted: list[str] = field(default_factory=list)
    """What was not in this layout, in words."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings beside an adapter. Raises AdapterError ADP-015, or ADP-016 when they are not those of one LoRA."""
    path = folder / CONFIG
    others = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if others:
        what = f"{folder} holds several adapters" if path.exists() else f"{path} is missing"
        what += f"; subfolders hold {', '.join(others[:3])}"
        raise AdapterError("ADP-015", what, "one at a time is used", f"a folder of one, such as {folder / others[0]}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if path.exists() else "it is missing"
        raise AdapterError("ADP-015", f"{path} cannot be read", why, "a folder that save_pretrained wrote") from None
    check_folder(folder, AdapterError)
    kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
    if kind != "LORA":
        raise AdapterError("ADP-016", f"{path} describes no LoRA adapter", f"its peft_type is {kind}", "a LoRA adapter")
    return dict(values)


def plain_config(folder: Path, values: dict[str, Any]) -> Any:
    """The LoraConfig of a plain adapter. Nothing that could change what the matrices mean is passed over."""
    from peft import LoraConfig, __version__

    known = {setting.name for setting in fields(LoraConfig)}
    strange = [key for key in values if key not in known and key not in (ORDER, DETAIL) and values[key]]
    extras = [key for key in NOT_PLAIN if values.get(key)]
    extras += ["bias"] if values.get("bias") not in (None, "none") else []
    extras += ["init_lora_weights"] if values.get("init_lora_weights") not in INITS else []
    if extras:
        what = ", ".join(f"{key}={json.dumps(values[key])[:60]}" for key in extras)
        why = "only updates B A of the published weights can be loaded and merged"
        raise AdapterError("ADP-016", f"{folder} is no plain LoRA adapter ({what})", why, "an adapter without these")
    if strange:
        what = f"{folder}: PEFT {__version__} does not know {', '.join(sorted(strange)[:3])} in {CONFIG}"
        raise AdapterError("ADP-016", what, "it may change what the weights mean", "the PEFT that wrote it, to resave")
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
        ranks, alphas = [config.r, *config.rank_pattern.values()], [config.lora_alpha, *config.alpha_pattern.values()]
        whole = all(type(rank) is int and rank > 0 for rank in ranks)
        if not whole or not all(type(alpha) in (int, float) for alpha in alphas):
            raise ValueError("a rank is no positive integer, or an alpha no number")
    except (TypeError, ValueError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise AdapterError("ADP-015", f"{folder / CONFIG} cannot be used", why, "the file as PEFT wrote it") from None
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices by their keys. Raises AdapterError ADP-015."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError("ADP-015", f"{path} is missing", "", f"a folder with {WEIGHTS}")
    try:
        read_header(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise AdapterError("ADP-015", f"{path} is damaged", why, "copy the folder again") from None


def paths_of(adapter: AdapterFile, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Path of a pair in the file -> the module it belongs to.

    Raises AdapterError: ADP-014 with the name of another layout, ADP-015 for half a pair, ADP-016 for a strange key.
    """
    stacks = [name for name, weight in weights.items() if len(weight.shape) == 3]
    found = {}
    for key, tensor in adapter.tensors.items():
        other = ""
        if re.search(r"\.experts\.\d+\.", key):
            other = "a pair per expert and matrix, as vLLM, SGLang and transformers 4 have it"
        elif tensor.dim() == 3 or any(f"{stack}." in key for stack in stacks):
            other = "a pair under the name of each stack, as vLLM, SGLang and Megatron have it"
        if other:
            what, why = f"{adapter.folder} cannot be loaded or merged here", f"its layout is {other}, e.g. {key}"
            raise AdapterError("ADP-014", what, why, "the adapter as PEFT saved it when it was trained")
        ends = (A, B, LENGTHS) if adapter.config.use_dora else (A, B)
        end = next((end for end in ends if key.endswith(end)), None)
        if not key.startswith(PREFIX) or end is None or tensor.dim() != (1 if end == LENGTHS else 2):
            what = f"{adapter.folder}: {key} is not understood"
            raise AdapterError("ADP-016", what, "it is no half of a pair lora_A, lora_B", "a plain LoRA adapter")
        path = key.removeprefix(PREFIX).removesuffix(end)
        if lacking := [end[1:] for end in ends if PREFIX + path + end not in adapter.tensors]:
            what = f"{adapter.folder}: {path} lacks {lacking[0]}"
            raise AdapterError("ADP-015", what, "the file is incomplete", "copy the folder again")
        found[path] = path.replace(".base_layer", "")
    return found


def update_of(parameter: str, key: str, config: Any) -> Update:
    """An update with the rank and scale that PEFT gives it."""
    from peft.utils.other import get_pattern_key

    # PEFT looks patterns up by the name of the module, or of the parameter where that was the target.
    name = parameter if targeted(parameter, config.target_parameters or ()) else parameter.removesuffix(".weight")
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return Update(parameter, key, rank, alpha / (rank**0.5 if config.use_rslora else rank))


def check_matrix(adapter: AdapterFile, update: Update, weight: Weight) -> None:
    """Raises AdapterError ADP-011 unless a pair fits its matrix."""
    a, b = (tuple(adapter.tensors[PREFIX + update.key + end].shape) for end in (A, B))
    if (a, b) != ((update.rank, weight.shape[1]), (weight.shape[0], update.rank)):
        what = f"{update.key} has lora_A {a} and lora_B {b}, but a weight {weight.shape} with rank {update.rank}"
        raise foreign(adapter.folder, what)
    lengths = adapter.tensors[PREFIX + update.key + LENGTHS] if adapter.config.use_dora else None
    if lengths is not None and tuple(lengths.shape) != (weight.shape[0],):
        raise foreign(adapter.folder, f"{update.key} has {len(lengths)} lengths for {weight.shape[0]} rows")


def targeted(parameter: str, targets: Iterable[str]) -> str:
    """The target that names a parameter, in full or by its end; empty without one."""
    return next((target for target in targets if f".{parameter}".endswith(f".{target}")), "")


def foreign(folder: Path, why: str) -> AdapterError:
    """The error about an adapter of another base."""
    return AdapterError("ADP-011", f"{folder} does not fit the base", why, "the base that the adapter was trained on")
