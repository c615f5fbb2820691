"""LoRA on experts: ours against stock transformers + PEFT, in one run: bytes, peaks, seconds per step, equal loss.

    .venv/bin/python scripts/bench_experts.py [--workloads quickstart8,qwen3_slice] [--rounds 7] [--tokens 512] [...]

Writes scripts/bench_results/experts_<machine>.json and .png. Exits with 1 when the losses of both sides differ.

Every side is a process of its own (`bench_experts_side.py`), so that its memory is its own. Ours and one stock side are
loaded from the same files with the same adapter and take the same steps in turn, one while the other sleeps, now one
first, now the other; the ratio stock/ours is taken per round and the median reported. Sides:

    ours         NF4 experts, LoRA in split form
    stock-bf16   AutoModelForCausalLM in bf16, the same PEFT adapter (`target_parameters` for the experts)
    stock-4bit   the same with BitsAndBytesConfig(load_in_4bit=True)
    stock-fp32   the same in fp32, only on a CPU without bf16 instructions: there ours multiplies in fp32 (as
                 `train.precision=auto` does), and most of its lead over bf16 is the CPU's
    unsloth      where it is installed beside a CUDA device; its adapter has one rank and its own noise

Workloads: `quickstart8` (the quickstart's base with 8 experts), `quickstart4` (as it is; bytes only), `qwen3_slice`
(one layer of Qwen3-30B-A3B with a small vocabulary, random weights), `qwen3_30b` (all of it, or as many layers as the
disk has room for; CUDA only). Needs about 10 GiB of memory and 5 GiB of disk for the first three. Run it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_experts_figure import draw
from bench_experts_shape import ROUTINGS, layers_that_fit, qwen3_config, shape_folder
from bench_experts_side import SIDES
from bench_experts_turns import FEWEST, Child, Problem, Start, Workload, compare, fp32_losses
from bench_quickstart import RESULTS, machine

from finetune.compose import load_recipe
from finetune.errors import FinetuneError
from finetune.fetch import cache_folder
from finetune.machine import multiplies_bf16
from finetune.record import versions
from finetune.rundir import write_json
from finetune.source import base_folder

WORKLOADS = ("quickstart8", "quickstart4", "qwen3_slice", "qwen3_30b")
LOSS_TOLERANCE = 1e-4
SMALL_VOCABULARY = 8192
"""Of the slice: a vocabulary of 151,936 beside one layer would be most of the model."""
CUDA_TOKENS = (4096, 8192, 16384)
HOW = {
    "seconds": "one step: forward, backward, AdamW on the adapter; bf16 autocast, or fp32 where `in_fp32`",
    "step_peak_bytes": "highest anonymous memory of the process in steps, without mapped files; on CUDA, of the device",
    "load_peak_bytes": "highest anonymous memory while loading, less what the process had before",
    "resident_bytes": "parameters, buffers and 4-bit maxima of the base, before the adapter",
    "saved_tensor_bytes": "storages that autograd kept between forward and backward, weights of the model excluded",
    "stock_over_ours_resident": "headline workload, the stock '4-bit' load",
    "stock_over_ours_seconds_median": "headline workload, the faster of stock-bf16 and stock-4bit",
    "stock_fp32_over_ours_seconds_median": "the same against stock in fp32: equal arithmetic on a CPU without bf16",
    "load_peak_over_4bit": "headline workload, ours: load_peak_bytes / resident_bytes",
    "loss_rows": "both sides with nothing quantised, in fp32; their seconds are not interleaved",
    "routing": "bench_experts_shape.py says how it is set; `own` is the model's own router",
}


def main(words: list[str], start: Start = Child) -> int:
    """Runs the benchmark and writes its figures; the exit code."""
    try:
        options = parse(words)
        figures = run(options, [prepare(name, options) for name in options.workloads], start)
    except (Problem, FinetuneError) as problem:
        print(f"bench_experts: {problem}", file=sys.stderr)
        return 2
    write_json(options.out, figures)
    draw(figures, options.out.with_suffix(".png"))
    print(json.dumps({k: v for k, v in figures.items() if k not in ("how", "pairs", "rows", "loss_rows")}, indent=2))
    print(f"Wrote {options.out} and {options.out.with_suffix('.png')}")
    difference = figures["fp32_loss_max_difference"]
    if difference is not None and not difference <= LOSS_TOLERANCE:
        print(f"bench_experts: the fp32 losses differ by {difference:.2e}, more than {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The settings; raises Problem on those that do not go together."""
    import torch

    cuda = torch.cuda.is_available()
    unsloth = cuda and importlib.util.find_spec("unsloth") is not None
    workloads = ["qwen3_30b"] if cuda else ["quickstart8", "quickstart4", "qwen3_slice"]
    sides = [*SIDES[:3], *(["unsloth"] if unsloth else []), *([] if multiplies_bf16() else ["stock-fp32"])]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", type=names, default=workloads, help=f"some of {','.join(WORKLOADS)}")
    add("--sides", type=names, default=sides, help=f"some of {','.join(SIDES)}")
    add("--rounds", type=int, default=7, help="timed rounds")
    add("--warmup", type=int, default=2, help="rounds before them, in the first of which tensors and calls are counted")
    add("--minutes", type=float, default=10.0, help=f"no further round of a cell after this, but at least {FEWEST}")
    add("--tokens", type=numbers, default=CUDA_TOKENS if cuda else (512,), help="tokens per step, e.g. 4096,8192")
    add("--length", type=int, default=4096 if cuda else 128, help="tokens of a row")
    add("--rank", type=int, default=16, help="LoRA rank of the attention")
    add("--expert-rank", type=int, default=16, help="LoRA rank inside each expert")
    add("--loss-steps", type=int, default=5, help="steps of the fp32 comparison; 0 leaves it out")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=cuda, help="recompute activations")
    add("--precision", choices=("auto", "bf16"), default="auto", help="of ours: auto is fp32 on a CPU without bf16")
    add("--shape", type=changes, default={}, help="changes of the slice's config, e.g. num_hidden_layers=2")
    add("--out", type=Path, default=RESULTS / f"experts_{slug(machine())}.json", help="the JSON file to write")
    options = parser.parse_args(words)
    for what, given, known in (("workloads", options.workloads, WORKLOADS), ("sides", options.sides, SIDES)):
        for name in given:
            if name not in known:
                raise Problem(f"--{what} has {name}, which is none of {', '.join(known)}")
    if "ours" not in options.sides:
        raise Problem("--sides must have ours: everything is compared with it")
    if "unsloth" in options.sides and not unsloth:
        raise Problem("--sides has unsloth, which needs a CUDA device and pip install 'finetune[unsloth]'")
    if "qwen3_30b" in options.workloads and not cuda:
        raise Problem("--workloads has qwen3_30b, which needs a CUDA device; qwen3_slice has its widths")
    if options.rounds < 1 or options.warmup < 1:
        raise Problem(f"--rounds {options.rounds} and --warmup {options.warmup} must be 1 or more")
    for tokens in options.tokens:
        if tokens % min(options.length, tokens):
            raise Problem(f"--tokens {tokens} is no multiple of --length {options.length}")
    return options


def names(text: str) -> list[str]:
    """Words between commas."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(word) for word in names(text))


def changes(text: str) -> dict[str, int]:
    """Settings such as num_hidden_layers=2 between commas."""
    return {key: int(value) for key, _, value in (word.partition("=") for word in names(text))}


def prepare(name: str, options: argparse.Namespace) -> Workload:
    """A workload with its files in place."""
    print(f"{name}: making its files, once", flush=True)
    if name.startswith("quickstart"):
        experts = int(name.removeprefix("quickstart"))
        folder = base_folder(load_recipe("legal_quickstart", f"model.upcycle_experts={experts}"))
        tokens = options.tokens if experts == 8 else ()
        return Workload(name=name, folder=folder, routings=("own",), tokens=tokens, text=True, fp32=experts == 8)
    cache = cache_folder(load_recipe("legal_quickstart"))
    if name == "qwen3_slice":
        config = qwen3_config(**({"num_hidden_layers": 1, "vocab_size": SMALL_VOCABULARY} | options.shape))
    else:
        layers = layers_that_fit(qwen3_config(), cache)
        if not layers:
            raise Problem(f"{cache} has no room for a layer of Qwen3-30B-A3B; set FINETUNE_CACHE to another disk")
        config = qwen3_config(num_hidden_layers=layers)
    folder = shape_folder(config, cache)
    return Workload(
        name=name, folder=folder, routings=ROUTINGS, tokens=options.tokens, text=False, fp32=name == "qwen3_slice"
    )


def run(options: argparse.Namespace, workloads: list[Workload], start: Start) -> dict[str, Any]:
    """Every figure of the benchmark."""
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for workload in workloads:
        with TemporaryDirectory(prefix="bench-experts-") as scratch:
            stocks = [side for side in options.sides if side != "ours"]
            if workload.fp32 and workload.tokens and stocks and options.loss_steps:
                losses.append(fp32_losses(workload, options, Path(scratch), start))  # first: whether it is worth timing
            for stock in stocks:
                compare(workload, stock, options, Path(scratch), start, rows, pairs)
    differences = [row["max_difference"] for row in losses]
    return headline(rows, pairs) | {
        "fp32_loss_max_difference": max(differences) if differences else None,
        "machine": about_machine(rows),
        "versions": versions(),
        "settings": {
            key: getattr(options, key)
            for key in ("rounds", "warmup", "length", "rank", "expert_rank", "loss_steps", "checkpointing", "precision")
        },
        "how": HOW,
        "pairs": pairs,
        "rows": rows,
        "loss_rows": losses,
    }


def headline(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that stand first: of the first cell that was timed, against the stock side that fares best."""
    first = next((row for row in pairs if "seconds_ratios" in row), None)
    if first is None:
        errors = [row["error"] for row in rows if "error" in row]
        raise Problem(f"no workload has timed steps of both sides; {errors[0] if errors else 'try quickstart8'}")
    at = {key: first[key] for key in ("workload", "tokens", "routing")}
    mine = [row for row in pairs if at.items() <= row.items()]
    ours = next(row for row in rows if at.items() <= row.items() and row["side"] == "ours")
    every = [row for row in mine if "seconds_ratios" in row]
    timed_pairs = [row for row in every if row["stock"] != "stock-fp32"] or every
    in_fp32 = [row["seconds_ratio_median"] for row in every if row["stock"] == "stock-fp32"]
    packed = [row["resident_ratio"] for row in mine if row["stock"] == "stock-4bit" and "resident_ratio" in row]
    return {
        "headline": at,
        "expert_bytes_per_param": ours["expert_bytes_per_param"],
        "stock_over_ours_resident": packed[0] if packed else None,
        "stock_over_ours_seconds_median": min(row["seconds_ratio_median"] for row in timed_pairs),
        "stock_fp32_over_ours_seconds_median": in_fp32[0] if in_fp32 else None,
        "peak_ours_over_stock": max(row["peak_ours_over_stock"] for row in timed_pairs),
        "load_peak_over_4bit": ours["load_peak_over_resident"],
        "load_peak_allowed": ours["load_peak_bytes"] <= ours["load_peak_allowed_bytes"],
        "tokens_per_second": ours["tokens_per_second"],
    }


def about_machine(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Processor, cores, what torch makes of them, memory, device and date."""
    import torch

    return {
        "cpu": machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": next(row["threads"] for row in rows if "threads" in row),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": date.today().isoformat(),
    }


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
