"""Our experts (NF4, split LoRA) beside stock transformers and PEFT: bytes, memory while loading, seconds per step.

    .venv/bin/python scripts/bench_experts.py [shape=base8|slice128|both] [tokens=512] [steps=6]

Shapes: `base8` is the quickstart's base with 8 experts (real weights), `slice128` two layers of a 128-expert model of
Qwen3-30B-A3B's sizes (random weights). Sides, all with LoRA on attention and experts, interleaved in one process:

    ours        experts and linear maps in NF4, LoRA in split form
    stock       everything in bf16, PEFT's `target_parameters`
    stock_4bit  transformers' own 4-bit loading, which leaves expert stacks in bf16, and the same PEFT settings

Writes scripts/bench_results/experts_<machine>.json. Run it alone on the machine; figures to quote are the ratios.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_quickstart import RESULTS, machine
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from finetune.adapters import attach, coverage
from finetune.base import Base, load_base
from finetune.compose import load_recipe
from finetune.recipe import Adapter
from finetune.record import versions
from finetune.rundir import write_json
from finetune.source import base_folder

RANK, ALPHA = 16, 32.0
SIDES = ("ours", "stock", "stock_4bit")


class Count(TorchDispatchMode):
    """Counts 4-bit dequantisations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.dequantisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dequantisations += "dequantize_4bit" in str(func)
        return func(*args, **(kwargs or {}))


def main(words: list[str]) -> None:
    """Measures the shapes asked for and writes the results."""
    settings = {"shape": "both", "tokens": "512", "steps": "6"} | dict(word.split("=", 1) for word in words)
    shapes = ("base8", "slice128") if settings["shape"] == "both" else (settings["shape"],)
    rows = [bench(shape, int(settings["tokens"]), int(settings["steps"])) for shape in shapes]
    first = rows[0]
    results = {
        "expert_bytes_per_param": first["ours"]["expert_bytes_per_param"],
        "stock_over_ours_resident": first["stock_4bit_over_ours_resident"],
        "stock_over_ours_seconds_median": first["stock_over_ours_seconds_median"],
        "load_peak_over_4bit": first["load_peak_over_4bit"],
        "tokens_per_second": first["ours"]["tokens_per_second"],
        "machine": machine(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "rows": rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"].lower()).strip("-")
    write_json(RESULTS / f"experts_{slug}.json", results)
    print(json.dumps(results, indent=2))


def bench(shape: str, tokens: int, steps: int) -> dict[str, Any]:
    """One shape: every side loaded, then stepped in turn, so that all see the same weather."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(shape, Path(scratch))
        sides = {side: load(side, folder) for side in SIDES}
        found: dict[str, Any] = {side: resident(base) for side, (base, _) in sides.items()}
        vocabulary = sides["ours"][0].model.config.vocab_size
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        optimizers = {side: optimizer(model) for side, (_, model) in sides.items()}
        for number in range(steps + 2):
            ids = torch.randint(5, vocabulary - 5, (4, tokens // 4), generator=torch.Generator().manual_seed(number))
            for side, (_, model) in sides.items():
                started = time.perf_counter()
                losses[side].append(step(model, optimizers[side], ids))
                if number >= 2:  # the first steps build oneDNN's kernels
                    seconds[side].append(time.perf_counter() - started)
            print(shape, number, {side: round(values[-1], 2) for side, values in seconds.items() if values}, flush=True)
        for side, (_, model) in sides.items():
            found[side] |= saved(model, ids) | {
                "seconds_per_step_median": statistics.median(seconds[side]),
                "tokens_per_second": tokens / statistics.median(seconds[side]),
                "losses": losses[side],
            }
    ours = found["ours"]
    pairs = zip(seconds["stock"], seconds["ours"], strict=True)
    return found | {
        "shape": shape,
        "tokens": tokens,
        "stock_over_ours_seconds_median": statistics.median(a / b for a, b in pairs),
        "stock_over_ours_resident": found["stock"]["resident_bytes"] / ours["resident_bytes"],
        "stock_4bit_over_ours_resident": found["stock_4bit"]["resident_bytes"] / ours["resident_bytes"],
        "stock_over_ours_saved": found["stock"]["saved_bytes"] / ours["saved_bytes"],
        "load_peak_over_4bit": ours["load_peak_bytes"] / ours["resident_bytes"],
    }


def checkpoint(shape: str, scratch: Path) -> Path:
    """The folder of a shape's checkpoint."""
    if shape == "base8":
        return base_folder(load_recipe("legal_quickstart", "model.upcycle_experts=8"))
    config = AutoConfig.for_model(
        **load_recipe("qwen3_30b_legal").model.config | {"num_hidden_layers": 2, "vocab_size": 4096}
    )
    set_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(scratch, max_shard_size="500MB")
    base_tokenizer = base_folder(load_recipe("qwen3_30b_legal", "scale=rehearsal"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scratch / name).write_bytes((base_tokenizer / name).read_bytes())
    return scratch


def load(side: str, folder: Path) -> tuple[Base, Any]:
    """(base, PEFT model) of one side."""
    set_seed(0)
    adapter = Adapter(rank=RANK, alpha=ALPHA, expert_rank=RANK, expert_alpha=ALPHA)
    if side == "ours":
        base = load_base(folder, load_in_4bit=True, precision="bf16")
        return base, attach(base, adapter).train()
    family = load_base(folder, load_in_4bit=True, precision="bf16").family
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    extra = {"quantization_config": four} if side == "stock_4bit" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **extra).requires_grad_(False)
    base = Base(model, None, family, folder, 0.0, 0.0, 0.0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(family.attention),
        target_parameters=[f"{family.experts}.{name}" for name in family.expert_parameters],
    )
    return base, get_peft_model(model, config).train()


def resident(base: Base) -> dict[str, float]:
    """Bytes of the frozen weights, of all and per parameter of the experts, and the peak while loading."""
    rows = {row.group: row for row in coverage(base.model, base.family)}
    return {
        "resident_bytes": sum(row.bytes for row in rows.values()),
        "expert_bytes_per_param": rows["routed"].bytes / rows["routed"].parameters,
        "load_peak_bytes": base.load_peak_gib * 2**30,
    }


def optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """One update; returns the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def saved(model: Any, ids: torch.Tensor) -> dict[str, int]:
    """Bytes that autograd keeps of one forward pass, and dequantisations of a forward and backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Count() as count:
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    model.zero_grad()
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return {
        "saved_bytes": sum(size for pointer, size in kept.items() if pointer not in frozen),
        "dequantisations_per_step": count.dequantisations,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
