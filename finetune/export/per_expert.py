"""The adapter with a pair of matrices per expert and map, as vLLM, SGLang and llama.cpp read it: `write_per_expert`.

PEFT keeps one pair per stack: A (E*r, in) with the expert as the slow row index, B (out, r*E) with the expert as the
fast column index. Of the stack of gate and up every expert gives two pairs: both have its A, and each has its rows of
its B. Servers multiply all pairs with one factor, lora_alpha / r, or with lora_alpha / (rank of the pair); so all pairs
get one rank here, by rows and columns of zeros, and what their own factor is more or less goes into B.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from finetune.errors import AdapterError
from finetune.families import Family
from finetune.layouts import PREFIX, A, B, adaptable, read_adapter
from finetune.rundir import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = re.compile(r"(.*\blayers\.\d+\.)(.+)$")


def write_per_expert(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """Writes the adapter in `adapter`, of the base in `base`, into the new folder `target`; says what was done.

    Raises AdapterError ADP-017 where servers have no such adapter: DoRA, an adapted router, or a family that says so.
    """
    import transformers
    from safetensors.torch import save_file

    from finetune.base import read_config

    family, config = read_config(base)
    with torch.device("meta"):
        model = getattr(transformers, family.auto_class).from_config(config)
    weights = adaptable(model, family)
    file = read_adapter(adapter, weights)
    if family.no_served_adapter or file.config.use_dora:
        why = family.no_served_adapter or "servers know no DoRA"
        raise AdapterError("ADP-017", f"{adapter} cannot be written with a pair per expert", why, "export.formats=[hf]")
    rank = max(update.rank for update in file.updates)
    (common, _), *_ = Counter(update.scale for update in file.updates).most_common()
    alpha: float = common * rank  # whole factors of two change no bit
    tensors: dict[str, torch.Tensor] = {}
    for update in file.updates:
        a, b = (file.tensors[PREFIX + update.key + end] for end in (A, B))
        factor = update.scale / common
        weight = weights[update.parameter]
        pairs = {update.parameter.removesuffix(".weight"): (a, b)}
        if len(weight.shape) == 3:
            pairs = split(update.parameter, a, b, update.rank, weight.is_transposed, family)
        for name, (pair_a, pair_b) in pairs.items():
            key = PREFIX + served_name(name, family)
            whole_a, whole_b = padded(pair_a, pair_b if factor == 1 else pair_b * factor, rank)
            tensors |= {key + A: whole_a, key + B: whole_b}
    target.mkdir()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    modules = sorted({key.removeprefix(PREFIX).removesuffix(A).rpartition(".")[2] for key in tensors if A in key})
    changed: dict[str, Any] = {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "target_parameters": None,
        "inference_mode": True,
    }
    write_json(target / CONFIG, file.values | changed)
    return {"rank": rank, "alpha": changed["lora_alpha"], "pairs": len(tensors) // 2}


def split(
    parameter: str, a: torch.Tensor, b: torch.Tensor, rank: int, is_transposed: bool, family: Family
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module of one expert's map -> its (A (r, in), B (out, r)), of the pair of a whole stack.

    A stack that its module calls transposed is adapted as (in, out) is stored: the update is then (B A)^T and PEFT's A
    still spans the input. One that is stored so without the mark is adapted the other way round: PEFT's A spans what
    the map puts out, and the two change places.
    """
    module, _, stack = parameter.rpartition(".")
    experts = a.shape[0] // rank
    a_ErN, b_EMr = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).permute(2, 0, 1)
    if family.transposed and not is_transposed:
        a_ErN, b_EMr = b_EMr.mT, a_ErN.mT
    gate, up, down = family.expert_names
    found = {}
    for expert in range(experts):
        one_a, one_b = a_ErN[expert], b_EMr[expert]
        if stack == family.expert_parameters[1]:
            found[f"{module}.{expert}.{down}"] = (one_a, one_b)
        elif family.interleaved:
            found[f"{module}.{expert}.{gate}"] = (one_a, one_b[::2])
            found[f"{module}.{expert}.{up}"] = (one_a, one_b[1::2])
        else:
            half = one_b.shape[0] // 2
            found[f"{module}.{expert}.{gate}"] = (one_a, one_b[:half])
            found[f"{module}.{expert}.{up}"] = (one_a, one_b[half:])
    return found


def served_name(module: str, family: Family) -> str:
    """The path of a module under which servers look for it: that of the published files."""
    match = LAYER.match(module)
    if family.served_experts and match and match[2].startswith(f"{family.experts}."):
        module = match[1] + family.served_experts + match[2].removeprefix(family.experts)
    for pattern, replacement in family.published_names:
        module = re.sub(pattern, replacement, module)
    return module


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair with rows and columns of zeros up to `rank`: the same product to the last bit."""
    more = rank - a.shape[0]
    assert more >= 0 and math.isfinite(rank)
    a = torch.nn.functional.pad(a, (0, 0, 0, more))
    return a.clone().contiguous(), torch.nn.functional.pad(b, (0, more)).clone().contiguous()
