"""How much memory of one device a recipe needs, part by part, and the smallest change that makes it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace

from finetune import sizes
from finetune.families import Family, Matrix
from finetune.figure import Figure, assumed, computed
from finetune.recipe import Recipe

STATE_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw": 8.0,
    "lion": 4.0,
    "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
    "adafactor": 0.0,
}
"""`train.optimizer` -> bytes of its state per trainable parameter: one or two moments in fp32, or in 8 bits with an
fp32 maximum per 256 of them. Adafactor's sums of rows and columns are next to nothing."""
ADAPTER, TRAINED_WEIGHTS, GRADIENTS, OPTIMIZER = "adapter weights", "trained weights", "gradients", "optimizer"
"""Names of the parts that are trained: `trained weights` takes the adapter's place where the base itself is trained."""
AT_REST = ("expert stacks, 4-bit", "other linear maps, 4-bit", "scales (absmax)", "weights kept in", "frozen weights")
"""Beginnings of the names of the parts that are the frozen base."""
BUCKET = 2**24
"""Gradients that DeepSpeed is told to send together (`train/zero.py`)."""
LOGIT_BYTES = 2 + 4 + 4
"""Bytes per logit: as computed (bf16), as fp32 for the loss, and its gradient."""
RESERVE_GIB = 1.5
"""Assumed for the device's own libraries and for memory lost between allocations."""


def memory(recipe: Recipe) -> list[Figure]:
    """The parts of the memory of one device in GiB while training.

    Raises RecipeError for a model card that cannot be computed with.
    """
    model, adapter, train = recipe.model, recipe.adapter, recipe.train
    weights, family = sizes.matrices(model), sizes.family_of_card(model)
    packed_bytes = sizes.nf4_bytes(adapter)
    plain = sizes.BF16_BYTES if train.precision == "bf16" else sizes.FP32_BYTES
    packed = [m for m in weights if sizes.is_4bit(m, family, adapter)]
    stacks = sizes.total_parameters([m for m in packed if m.experts])
    linear = sizes.total_parameters(packed) - stacks
    rest = sizes.total_parameters(weights) - stacks - linear
    trainable = sizes.trained_parameters(weights, family, adapter)
    whole = adapter.method == "full"
    kept_bytes, kept_how = rest * plain, f"{rest:,} x {plain} B"
    if whole:
        frozen = [m for m in weights if not sizes.is_trained_whole(m, family, adapter)]
        large = sizes.total_parameters([m for m in frozen if sizes.is_large(m.group)])
        small = sizes.total_parameters(frozen) - large
        kept_bytes, kept_how = large * plain + small * sizes.FP32_BYTES, f"{large:,} x {plain} B + {small:,} x 4 B"

    sharing = parts_of_a_row(recipe)
    tokens = train.batch_size * math.ceil(recipe.data.max_length / sharing)
    vocabulary, hidden = weights[0].rows, weights[0].columns
    layers = max(m.count for m in weights if m.group == "attention")
    maps = [m for m in weights if m.group != "embedding" and m.columns > 1]
    per_token = sum(_kept_per_token(m, family) * m.count for m in maps) * plain
    if train.gradient_checkpointing:
        stored, kept = tokens * (per_token / layers + layers * hidden * plain), "one layer and the input of every layer"
    else:
        stored, kept = tokens * per_token, "every layer"
    stacked = sum(m.rows * m.columns * m.experts for m in packed)
    scratch = float(max(stacked, max((m.rows * m.columns for m in packed), default=0)) * plain)
    if whole:  # the largest stack as it is multiplied with, and its gradient on the way to fp32
        scratch = 2.0 * plain * max(m.rows * m.columns * max(m.experts, 1) for m in maps)
    share, among = shards(recipe), divides(recipe)
    beside = packed_bytes - 0.5
    if share > 1:
        scratch += 2 * stacked * packed_bytes + vocabulary * hidden * plain

    def part(name: str, size: float, how: str) -> Figure:
        return computed(name, size / sizes.GIB, "GiB", how)

    def guess(name: str, size: float, how: str) -> Figure:
        return assumed(name, size / sizes.GIB, "GiB", how)

    state = STATE_BYTES[train.optimizer]
    split = f" / {share} devices" if share > 1 else ""
    divided = f" / {among} devices" if among > 1 else ""
    gathered = "; two layers as they come from the other devices" if share > 1 else ""
    shape = f"{train.batch_size} rows x {recipe.data.max_length:,} tokens"
    shape += f" / {sharing} devices" if sharing > 1 else ""
    maxima = (stacks + linear) * beside / share
    of_values = "" if beside >= 4 / 64 else ", in 8 bits"
    parts = [
        part("expert stacks, 4-bit", stacks * 0.5 / share, f"{stacks:,} x 0.5 B{split}"),
        part("other linear maps, 4-bit", linear * 0.5 / share, f"{linear:,} x 0.5 B{split}"),
        part("scales (absmax)", maxima, f"{stacks + linear:,} x {beside:.4g} B: one maximum per 64{of_values}{split}"),
        part("frozen weights" if whole else f"weights kept in {train.precision}", kept_bytes / share, kept_how + split),
        part(TRAINED_WEIGHTS if whole else ADAPTER, trainable * 4 / share, f"{trainable:,} x 4 B{split}"),
    ]
    if among > share:
        own, copied = trainable * 4 / among, f"{trainable:,} x 4 B{divided}"
        parts.append(part(f"{parts[-1].name}, a copy of its part", own, f"{copied}: what DeepSpeed updates"))
        parts.append(part(GRADIENTS, own * 2, f"{copied}, twice while weights are updated"))
        parts.append(part("gradients on their way", BUCKET * 4, f"{BUCKET:,} x 4 B: DeepSpeed's bucket"))
    else:
        parts.append(part(GRADIENTS, trainable * 4 / share, f"{trainable:,} x 4 B{split}"))
    parts.append(
        part(OPTIMIZER, trainable * state / among, f"{trainable:,} x {state:.3g} B, {train.optimizer}{divided}")
    )
    if copies(recipe) > 1 and among == 1:
        parts.append(part("gradients on their way", trainable * 4, f"{trainable:,} x 4 B: DDP's buckets"))
    return [
        *parts,
        guess("activations", stored, f"{shape}, inputs and outputs of the linear maps of {kept}, {plain} B each"),
        guess("logits", tokens * vocabulary * LOGIT_BYTES, f"{shape} x {vocabulary:,} x (2 + 4 + 4) B"),
        guess("unpacked weights", scratch, f"largest map or all stacks of a layer, {plain} B per parameter{gathered}"),
        guess("reserve", RESERVE_GIB * sizes.GIB, "libraries and fragmentation"),
    ]


def with_and_without_recomputing(recipe: Recipe) -> tuple[Figure, ...]:
    """What activations take either way, what the device then needs, and how many layers would recompute theirs."""
    found = []
    for on, words in ((False, "without checkpointing"), (True, "with checkpointing")):
        parts = {part.name: part for part in memory(_with_recomputing(recipe, on))}
        how = f"{parts['activations'].how}; the device then needs {sum(p.value for p in parts.values()):,.1f} GiB"
        found.append(assumed(f"activations {words}", parts["activations"].value, "GiB", how))
    layers = sizes.depth(sizes.matrices(recipe.model))
    parts = {part.name: part for part in memory(recipe)}
    loaded = sum(p.value for p in parts.values() if p.name.startswith((*AT_REST, ADAPTER, TRAINED_WEIGHTS)))
    if not recipe.train.gradient_checkpointing:
        count, how = 0, "train.gradient_checkpointing=false"
    elif recipe.train.checkpointed_layers:
        count, how = min(recipe.train.checkpointed_layers, layers), "train.checkpointed_layers"
    else:
        free = recipe.costs.device_gib - loaded
        count = layers_to_recompute(recipe, layers, free)
        how = f"of {layers}: as few as fit into the {max(free, 0):,.1f} GiB that the weights leave; seen when it starts"
    return (*found, assumed("layers that recompute", count, "", how))


def copies(recipe: Recipe) -> int:
    """How many processes train together."""
    return recipe.launch.nodes * recipe.launch.devices


def parts_of_a_row(recipe: Recipe) -> int:
    """How many devices share a row."""
    launch = recipe.launch
    return launch.context_parallel if launch.devices % launch.context_parallel == 0 else 1


def shards(recipe: Recipe) -> int:
    """How many devices share the weights of the base."""
    launch = recipe.launch
    return launch.nodes * launch.devices if launch.distribution == "fsdp2" else 1


def divides(recipe: Recipe) -> int:
    """How many devices share the optimizer's state: those that share the weights, or with DeepSpeed all of them."""
    return copies(recipe) if recipe.launch.distribution == "deepspeed" else shards(recipe)


def devices_that_fit(recipe: Recipe) -> int:
    """The smallest power of two of devices that share the base's weights (FSDP2) and on which it fits; 0 for none."""
    for count in (2**n for n in range(1, 11)):
        launch = replace(recipe.launch, nodes=1, devices=count, distribution="fsdp2")
        if needed_gib(replace(recipe, launch=launch)) <= recipe.costs.device_gib:
            return count
    return 0


def _kept_per_token(matrix: Matrix, family: Family) -> int:
    """Numbers per token that a map keeps for the backward pass: its input and output.

    The routed block is one function that keeps the output of its first projection and its input, which the router keeps
    anyway (finetune/experts/grouped.py).
    """
    if not matrix.experts:
        return matrix.rows + matrix.columns
    first = matrix.name.endswith(f".{family.expert_parameters[0]}")
    return matrix.rows * matrix.active if first else 0


def layers_to_recompute(recipe: Recipe, layers: int, free_gib: float) -> int:
    """How many of `layers` must recompute their activations so that training fits into `free_gib`.

    The weights and the adapter are loaded already. All of them, when even that does not fit.
    """
    counted = {part.name: part.value for part in memory(_with_recomputing(recipe, False))}
    all_kept = counted["activations"]
    one_layer, one_input = all_kept / layers, _with_inputs(recipe) / layers
    later = counted["logits"] + counted["unpacked weights"] + counted["reserve"]
    later += counted[GRADIENTS] + counted[OPTIMIZER]  # the values are there already
    later += counted["gradients on their way"] if "gradients on their way" in counted else 0.0
    for count in range(layers):
        if later + (layers - count) * one_layer + count * one_input + (one_layer if count else 0) <= free_gib:
            return count
    return layers


def _with_inputs(recipe: Recipe) -> float:
    """The inputs of all layers in GiB."""
    weights = sizes.matrices(recipe.model)
    layers, hidden = max(m.count for m in weights if m.group == "attention"), weights[0].columns
    plain = sizes.BF16_BYTES if recipe.train.precision == "bf16" else sizes.FP32_BYTES
    tokens = recipe.train.batch_size * math.ceil(recipe.data.max_length / parts_of_a_row(recipe))
    return tokens * layers * hidden * plain / sizes.GIB


def _with_recomputing(recipe: Recipe, on: bool) -> Recipe:
    return replace(recipe, train=replace(recipe.train, gradient_checkpointing=on))


def needed_gib(recipe: Recipe) -> float:
    """Memory of one device in GiB."""
    return sum(part.value for part in memory(recipe))


def smallest_change(recipe: Recipe) -> list[str]:
    """The settings (`key=value`) to change so that the recipe fits into `costs.device_gib`.

    Empty when it fits as it is, or when no change makes it fit: compare `needed_gib`. Changes that leave the result as
    it is come first (recompute, smaller batches with as many rows per update), then smaller adapters.
    """
    limit = recipe.costs.device_gib
    if needed_gib(recipe) <= limit:
        return []
    changes = list(_changes(recipe))
    for count in range(1, len(changes) + 1):
        for combination in itertools.combinations(changes, count):
            trial = deepcopy(recipe)
            words = [word for change in combination for word in change(trial)]
            if needed_gib(trial) <= limit:
                return words
    return []


def _changes(recipe: Recipe) -> Iterator[Callable[[Recipe], list[str]]]:
    """Single changes, the mildest first."""
    if not recipe.train.gradient_checkpointing:
        yield _checkpointing
    if recipe.train.batch_size > 1:
        yield _single_rows
    if not recipe.adapter.load_in_4bit and recipe.adapter.method != "full":
        yield _four_bits
    adapter = recipe.adapter
    if adapter.targets != "attention" and not (adapter.rank_pattern or adapter.alpha_pattern):
        yield _attention_only


def _checkpointing(recipe: Recipe) -> list[str]:
    recipe.train.gradient_checkpointing = True
    return ["train.gradient_checkpointing=true"]


def _single_rows(recipe: Recipe) -> list[str]:
    train = recipe.train
    train.accumulation, train.batch_size = train.accumulation * train.batch_size, 1
    return ["train.batch_size=1", f"train.accumulation={train.accumulation}"]


def _four_bits(recipe: Recipe) -> list[str]:
    recipe.adapter.load_in_4bit = True
    return ["adapter.load_in_4bit=true"]


def _attention_only(recipe: Recipe) -> list[str]:
    recipe.adapter.targets = "attention"
    return ["adapter.targets=attention"]
