"""Where LoRA goes, and the proof that it went there: `attach`, `load_adapter`, `coverage`, `check_coverage`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from finetune.base import Base
from finetune.errors import NumbersError
from finetune.experts import ExpertsLora, nf4
from finetune.experts.stack import is_packed
from finetune.families import GROUPS, Family, Group
from finetune.layouts import adaptable, foreign, read_adapter
from finetune.recipe import Adapter

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(slots=True)
class CoverageRow:
    """One line of the coverage table: what a group holds, how it is stored, and how much of it is adapted."""

    group: Group
    """Where the weights belong."""
    parameters: int
    """Frozen parameters, counted unpacked."""
    bytes: int
    """Bytes they take in memory, 4-bit maxima included."""
    parameters_4bit: int
    """How many of them are really stored in 4 bits."""
    adapted: int
    """How many of them have an adapter beside them."""
    trainable: int
    """Parameters of these adapters."""


def attach(base: Base, adapter: Adapter) -> PeftModel:
    """The base with a new LoRA adapter: A random (from torch's seed), B zero, both fp32.

    Raises NumbersError (ADP-010) when the adapted weights are not exactly those the settings ask for.
    """
    with warnings.catch_warnings():
        # PEFT looks for rank patterns among modules only, says that ours for stacks match nothing, and applies them.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        model = get_peft_model(base.model, lora_config(base, adapter))
    to_fp32(model)
    check_coverage(model, base.family, adapter)
    return model


def load_adapter(base: Base, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The base with the adapter in `folder`, a PEFT folder in any layout that `layouts` can read.

    Raises AdapterError: ADP-011 unless the file holds exactly the weights that its settings mean for this base, ADP-012
    to ADP-016 when it cannot be read without guessing.
    """
    adapter = read_adapter(folder, adaptable(base.model, base.family))
    config = adapter.config
    config.inference_mode = not trainable
    register_layers(config, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        try:
            model = PeftModelForCausalLM(base.model, config)
        except ValueError as error:  # PEFT finds no layer for the settings
            raise foreign(folder, str(error).splitlines()[0]) from error
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        if adapter.tensors.keys() != wanted:
            different = sorted(adapter.tensors.keys() ^ wanted)
            raise foreign(folder, f"{len(different)} weights are on one side only, e.g. {different[0]}")
        set_peft_model_state_dict(model, adapter.tensors)
    to_fp32(model)
    return model if trainable else model.eval()


def lora_config(base: Base, adapter: Adapter) -> LoraConfig:
    """PEFT's settings for an adapter, with explicit paths below the decoder layer and never "all-linear"."""
    family = base.family
    stacks, matrices = target_parameters(family, adapter)
    has_stacks = bool(stacks)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # PEFT divides it by the rank; a fraction is fine
        lora_dropout=adapter.dropout,
        target_modules=list(present(base.model, family.attention)),
        target_parameters=[*stacks, *matrices] or None,
        rank_pattern={re.escape(name): adapter.expert_rank for name in stacks} if has_stacks else {},
        alpha_pattern={re.escape(name): adapter.expert_alpha for name in stacks} if has_stacks else {},
    )
    register_layers(config, base)
    return config


def target_parameters(family: Family, adapter: Adapter) -> tuple[list[str], list[str]]:
    """(expert stacks, other weights) that an adapter names as parameters rather than as modules.

    Shared and dense MLPs are named so because PEFT redirects every *module* whose name ends in gate_proj, up_proj or
    down_proj to the routed experts of some families, full paths included (peft 0.21.2,
    utils/transformers_weight_conversion.py). On disk the keys are the ordinary ones.
    """
    stacks = [f"{family.experts}.{name}" for name in family.expert_parameters] if family.experts else []
    if adapter.targets == "attention":
        stacks = []
    others = [f"{name}.weight" for name in family.shared + family.dense] if adapter.targets == "all" else []
    if adapter.router and family.router:
        others.append(f"{family.router}.weight")
    return stacks, others


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


def to_fp32(model: nn.Module) -> None:
    """Keeps every trained weight in fp32, whatever a library cast it to: bf16 loses updates below 1/256 of a weight."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


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
            row = rows[group_of(plain, family)]
            if ".lora_" in f".{path}.{name}":
                row.trainable += parameter.numel() if parameter.requires_grad else 0
                continue
            count, packed, size = measure(module, name, parameter)
            row.parameters += count
            row.bytes += size
            row.parameters_4bit += count if packed else 0
            row.adapted += count if plain in adapted else 0
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
    return re.sub(r"\.lora_[AB]\.[^.]+", "", path)


def group_of(path: str, family: Family) -> Group:
    """The group of a parameter by its plain path."""
    match = LAYER.search(path)
    if not match:
        return "embedding" if ("embed_tokens" in path or "lm_head" in path) else "other"
    below = match[2]
    module = below.rpartition(".")[0]
    if family.experts and (module == family.experts or below.startswith(family.experts + ".")):
        return "routed"
    if family.router and (module == family.router or module.startswith(family.router + ".")):
        return "router"
    if module in family.shared:
        return "shared"
    if module in family.dense:
        return "dense"
    blocks = {name.partition(".")[0] for name in family.attention}
    return "attention" if below.partition(".")[0] in blocks else "other"


def wanted_parameters(model: nn.Module, family: Family, adapter: Adapter) -> set[str]:
    """Plain paths of the parameters that the settings ask to adapt, found from the model's own names."""
    stacks, others = target_parameters(family, adapter)
    names = {f"{name}.weight" for name in family.attention} | set(stacks) | set(others)
    found = set()
    for path, _ in model.named_parameters():
        plain = plain_path(path)
        match = LAYER.search(plain)
        if match and match[2] in names:
            found.add(plain)
    return found


def check_coverage(model: nn.Module, family: Family, adapter: Adapter) -> None:
    """Raises NumbersError (ADP-010) unless exactly the asked weights are adapted and nothing else is trainable."""
    wanted, have = wanted_parameters(model, family, adapter), adapted_parameters(model)
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
