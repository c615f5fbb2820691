"""Merging: memory that does not grow with the model, and speed against a plain copy of the same files.

    .venv/bin/python scripts/bench_merge.py [--rounds 5] [--experts 32] [--hidden 1024] [--intermediate 512]

Writes scripts/bench_results/merge_<machine>.json. Makes checkpoints of 2 and of 20 files (one layer each, all tensors
of one size, random bf16 weights under the names and shapes of a Qwen3-MoE model) with adapters on all experts and on
attention. Every merge and every copy is a process of its own; imports are the same and not counted, planning and
hashing are. Both sides begin with warm memory and end when the disk holds the files (fsync). They take turns; ratios
are taken per round and the median reported. Memory is the highest resident set of the process. The adapter is in memory
and grows with the model, so growth is given without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench_quickstart import RESULTS, machine

FEW, MANY = 2, 20
"""Files of the two checkpoints."""
RANK, EXPERT_RANK = 16, 8
VOCABULARY = 4096
WARM = """
some = bytearray({0})
some[::4096] = bytes(len(range(0, {0}, 4096)))
"""
"""Touches memory and gives it back. A virtual machine asks its host for memory that was free for long, which takes
three times as long as what it has: without this a side is slow or fast by what ran before it."""


def main(words: list[str]) -> None:
    """Runs all rounds, or the side that a parent asks for."""
    if words[:1] == ["--side"]:
        print(json.dumps({"merge": merge_side, "copy": copy_side}[words[1]](*map(Path, words[2:]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison with a copy")
    parser.add_argument("--experts", type=int, default=32, help="experts of a layer")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model")
    parser.add_argument("--intermediate", type=int, default=512, help="width of an expert")
    parser.add_argument("--threads", type=int, default=0, help="threads of arithmetic; 0 means one per core")
    parser.add_argument("--scratch", default=None, help="folder for checkpoints; the temporary one without it")
    options = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = str(options.threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.scratch) as scratch:
        figures = run(options, Path(scratch))
    slug = "".join(c if c.isalnum() else "-" for c in machine().lower()).strip("-")
    target = RESULTS / f"merge_{'-'.join(filter(None, slug.split('-')))}.json"
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every figure."""
    from finetune.record import versions

    memory = []
    for files in (FEW, MANY):
        base, adapter = write_model(scratch / f"{files}", files, options)
        done = child("merge", base, adapter, scratch / "merged")
        memory.append(
            {
                "files": files,
                "checkpoint_mib": mib(base.glob("*.safetensors")),
                "adapter_mib": mib(adapter.glob("*.safetensors")),
                "peak_mib": done["peak_mib"],
                "start_mib": done["start_mib"],
            }
        )
        print(memory[-1])
        shutil.rmtree(scratch / "merged")
    rounds = []
    for number in range(options.rounds):
        taken: dict[str, Any] = {}
        for side in ("copy", "merge") if number % 2 == 0 else ("merge", "copy"):
            taken[side] = child(side, base, adapter, scratch / side)
            shutil.rmtree(scratch / side)
        rounds.append(taken)
        print(f"round {number + 1}/{options.rounds}: { ({side: taken[side]['seconds'] for side in taken}) }")
    ratios = [r["copy"]["seconds"] / r["merge"]["seconds"] for r in rounds]
    size = memory[-1]["checkpoint_mib"]
    few, many = memory
    beyond = many["peak_mib"] - few["peak_mib"] - (many["adapter_mib"] - few["adapter_mib"])
    return {
        "merge_over_copy_throughput_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "merge_mib_per_second": [round(size / r["merge"]["seconds"]) for r in rounds],
        "copy_mib_per_second": [round(size / r["copy"]["seconds"]) for r in rounds],
        "merge_cpu_seconds": [r["merge"]["cpu_seconds"] for r in rounds],
        "copy_cpu_seconds": [r["copy"]["cpu_seconds"] for r in rounds],
        "memory": memory,
        "peak_growth_without_adapter_mib": round(beyond, 1),
        "peak_growth_without_adapter": round(beyond / few["peak_mib"], 4),
        "shape": {k: getattr(options, k) for k in ("experts", "hidden", "intermediate")},
        "rank": RANK,
        "expert_rank": EXPERT_RANK,
        "rounds": options.rounds,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def child(side: str, base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """One side, in a process of its own, once the disk has nothing else to write."""
    os.sync()
    command = [sys.executable, __file__, "--side", side, str(base), str(adapter), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def merge_side(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """Seconds and memory of a merge without its proof."""
    merge_folder = ready()
    before = peak_mib()
    cpu, started = os.times(), time.monotonic()
    merge_folder(base, adapter, target)
    return taken(cpu, started) | {"start_mib": before}


def copy_side(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """Seconds of a copy."""
    from finetune.rundir import fsync

    ready()
    cpu, started = os.times(), time.monotonic()
    shutil.copytree(base, target)
    for path in target.iterdir():
        fsync(path)
    fsync(target)
    return taken(cpu, started)


def ready() -> Any:
    """What both sides do before they begin: import the same, and make free memory warm."""
    import torch

    from finetune.machine import available_gib
    from finetune.merge import merge_folder

    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()  # the first product starts the threads
    count = min(6 * 2**30, int(available_gib() * 2**30) // 2)
    subprocess.run([sys.executable, "-c", WARM.format(count)], check=True)  # not here: it would be our highest memory
    return merge_folder


def taken(cpu: os.times_result, started: float) -> dict[str, float]:
    """What a side took since it began."""
    now, seconds = os.times(), time.monotonic() - started
    busy = now.user - cpu.user + now.system - cpu.system
    return {"seconds": round(seconds, 3), "cpu_seconds": round(busy, 2), "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Highest resident set of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()  # a maximum from getrusage would begin with the parent's
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024, 1)


def mib(paths: Any) -> float:
    """Bytes of some files in MiB."""
    return round(sum(path.stat().st_size for path in paths) / 2**20, 1)


def write_model(folder: Path, files: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """(folder of a checkpoint with one layer in each file, folder of an adapter for it)."""
    import torch
    from safetensors.torch import save_file

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    hidden, inner, experts = options.hidden, options.intermediate, options.experts
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": inner, "moe_intermediate_size": inner,
        "num_hidden_layers": files, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "head_dim": 64, "num_experts": experts, "num_experts_per_tok": 4, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(17)

    def some(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16) * 0.02

    where: dict[str, str] = {}
    lora: dict[str, Any] = {}
    for layer in range(files):
        path, name = f"model.layers.{layer}.", f"model-{layer + 1:05d}-of-{files:05d}.safetensors"
        tensors = {f"{path}{norm}.weight": some(hidden) for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{path}self_attn.{norm}.weight": some(64) for norm in ("q_norm", "k_norm")}
        tensors[f"{path}mlp.gate.weight"] = some(experts, hidden)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{path}self_attn.{part}.weight"] = some(hidden, hidden)
            key = f"base_model.model.{path}self_attn.{part}.lora_"
            lora |= {key + "A.weight": torch.randn(RANK, hidden), key + "B.weight": torch.randn(hidden, RANK) * 1e-3}
        for expert in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, inner) if part == "down_proj" else (inner, hidden)
                tensors[f"{path}mlp.experts.{expert}.{part}.weight"] = some(*shape)
        for deep, rows, columns in (("base_layer.", 2 * inner, hidden), ("", hidden, inner)):
            key, rank = f"base_model.model.{path}mlp.experts.{deep}lora_", experts * EXPERT_RANK
            lora |= {key + "A.weight": torch.randn(rank, columns), key + "B.weight": torch.randn(rows, rank) * 1e-3}
        if layer == 0:
            tensors["model.embed_tokens.weight"] = some(VOCABULARY, hidden)
        if layer == files - 1:
            tensors |= {"lm_head.weight": some(VOCABULARY, hidden), "model.norm.weight": some(hidden)}
        save_file(tensors, base / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r"mlp\.experts\.(gate_up|down)_proj": EXPERT_RANK}, "bias": "none",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return base, adapter


if __name__ == "__main__":
    main(sys.argv[1:])
