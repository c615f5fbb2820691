"""What a job writes to disk and fetches, and how large each of it is: `disk(recipe)`. Arithmetic only."""

from __future__ import annotations

from finetune import sizes
from finetune.check import source_kind
from finetune.figure import Figure, assumed, computed, given
from finetune.recipe import Recipe, Train

GGUF_BITS = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.6,
    "q5_k_m": 5.7,
    "q5_k_s": 5.5,
    "q4_k_m": 4.9,
    "q4_k_s": 4.6,
    "q3_k_m": 3.9,
    "q2_k": 3.4,
}
"""Type of a GGUF file -> bits per parameter. Those below `q8_0` mix types by layer: about so many."""
WORDS_GIB = 2**-14
"""A file of a few kilobytes, rounded up."""


def disk(recipe: Recipe) -> tuple[Figure, ...]:
    """GiB that are fetched, cached and written: one figure per folder of the run, and per format of the export."""
    model, merged = recipe.model, sizes.merged_gib(recipe.model)
    weights, family = sizes.matrices(model), sizes.family_of_card(model)
    adapter = sizes.trained_parameters(weights, family, recipe.adapter) * sizes.FP32_BYTES / sizes.GIB
    tuned = "tuned" if recipe.adapter.method == "full" else "adapter"
    train, published = recipe.train, sizes.weights_gib(model)
    saved = states_at_most(train) * 3 * adapter  # values and two moments of AdamW
    best = ", the best" if train.evaluate_steps else ""
    if model.tiny:
        download = given("download", 0.0, "GiB", "nothing is fetched, the model is made here")
    elif model.download_gib > 0:
        download = given("download", published, "GiB", "size as published")
    else:
        download = computed("download", published, "GiB", "all parameters x 2 B")
    kind = source_kind(model.source)
    fetched = 0.0 if model.tiny or kind not in ("package", "hub") or not recipe.network else published
    made = merged if model.tiny or model.upcycle_experts else 0.0
    return (
        download,
        computed("cache", fetched + made, "GiB", "what is fetched or made once, for all runs"),
        computed(tuned, adapter, "GiB", "trainable parameters x 4 B"),
        computed("checkpoints", saved, "GiB", f"{train.keep_checkpoints}{best} and one in the making, x 3 x {tuned}"),
        computed("merged", merged, "GiB", "all parameters x 2 B"),
        *(_export(name, recipe, merged, adapter) for name in recipe.export.formats),
    )


def states_at_most(train: Train) -> int:
    """Training states that lie on the disk at once: those kept, the best where it is measured, one in the making."""
    return train.keep_checkpoints + bool(train.evaluate_steps) + 1


def _export(name: str, recipe: Recipe, merged: float, adapter: float) -> Figure:
    """One format of the export, as if it shared nothing with what is there."""
    title = f"export, {name}"
    if name in ("peft", "peft_per_expert"):
        copies = 2 if name == "peft_per_expert" and recipe.export.gguf_adapter else 1
        how = "what was trained x 4 B" + (", twice: as a GGUF file too" if copies > 1 else "")
        how += "; on one disk it shares the adapter's bytes" if name == "peft" else ""
        return computed(title, copies * adapter, "GiB", how)
    if name == "gguf":
        bits = [GGUF_BITS[kind] for kind in recipe.export.gguf]
        how = "; ".join(f"{kind}: all parameters x {GGUF_BITS[kind]:g} / 8 B" for kind in recipe.export.gguf)
        return assumed(title, merged * sum(bits) / 16, "GiB", how)
    if name == "hf":
        return computed(title, merged, "GiB", "all parameters x 2 B; on one disk they share those of `merged`")
    return computed(title, WORDS_GIB, "GiB", "a few lines that name what is there")
