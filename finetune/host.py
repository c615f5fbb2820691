"""How much memory of one machine's host each part of a job needs at most: `host(recipe)`. Arithmetic only, no torch.

The parts come one after another, so that the largest counts, beside the libraries. On a machine without a GPU the host
is the device: what the device needs comes on top of the libraries, and not beside it.
"""

from __future__ import annotations

import os

from finetune import memory, sizes
from finetune.figure import Figure, assumed, computed
from finetune.recipe import Recipe

LIBRARIES_GIB = 1.0
"""Assumed for Python and its libraries, per process."""
WORKER_GIB = 0.27
"""Assumed per process that prepares rows: 0.80 GiB were seen for three (scripts/bench_results/data_*.json)."""
PROOF_FP32_GIB = 4.0
"""Bases up to this size are compared with what was merged in fp32, larger ones in bf16."""


def host(recipe: Recipe) -> tuple[Figure, ...]:
    """Host memory of one machine in GiB, by part; the last is the most that is needed at a time."""
    model, here = recipe.model, recipe.launch.devices
    weights = sizes.matrices(model)
    total = sizes.total_parameters(weights)
    published = sizes.merged_gib(model) if model.upcycle_experts else sizes.weights_gib(model)
    share = memory.shards(recipe)  # each process then reads its own experts only
    group = max(m.rows * m.columns * (m.experts / share if m.experts else 1) for m in weights) / total * published
    each = f" x {here} processes" if here > 1 else ""
    adapter = sizes.trained_parameters(weights, sizes.family_of_card(model), recipe.adapter) * 4 / sizes.GIB
    largest = max(m.rows * m.columns for m in weights if m.group != "embedding") * sizes.FP32_BYTES / sizes.GIB
    workers = recipe.data.workers or os.cpu_count() or 1
    proof = sizes.FP32_BYTES if published <= PROOF_FP32_GIB else sizes.BF16_BYTES
    parts = [
        computed(
            "loading the base", 2 * group * here, "GiB", f"2 x the largest group of tensors{each}, then given back"
        ),
        assumed(
            "preparing rows",
            (1 + workers) * WORKER_GIB,
            "GiB",
            f"1 + {workers} processes x {WORKER_GIB} GiB (benchmark)",
        ),
        computed(
            "merging", adapter + 3 * largest, "GiB", "what was trained, and the largest matrix three times in fp32"
        ),
    ]
    if recipe.train.optimizer.startswith("paged_"):
        state = sum(p.value for p in memory.memory(recipe) if p.name == memory.OPTIMIZER) * here
        parts.append(computed("optimizer, paged out", state, "GiB", f"all of it, when the device is full{each}"))
    most = max(part.value for part in parts) + LIBRARIES_GIB * here
    return (
        assumed("libraries", LIBRARIES_GIB * here, "GiB", f"Python and its libraries{each}"),
        *parts,
        computed("host memory", most, "GiB", "libraries and the largest part above, per machine"),
        computed(
            "proving the merge", total * proof / sizes.GIB, "GiB", _proof(recipe, total * proof / sizes.GIB, proof)
        ),
    )


def _proof(recipe: Recipe, gib: float, each: int) -> str:
    how = f"of the device, or of the host without a GPU: all parameters x {each} B, to compare answers"
    limit = recipe.costs.device_gib
    return how + (f"; more than the {limit:g} GiB of one {recipe.costs.device}" if gib > limit else "")
