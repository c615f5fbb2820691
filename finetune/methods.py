"""Which ways to tune fit a family and each other: `problems(recipe)`. No torch; called by `check`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from finetune import sizes
from finetune.errors import RecipeError
from finetune.families import Family, Matrix
from finetune.recipe import Adapter, Recipe

DOTTED = ("model.layers.", "model.language_model.layers.")
"""How paths of decoder layers begin, in text models and in multimodal ones."""

UPDATES_ONLY = (
    "double_quantisation", "dropout", "rslora", "init", "rank_pattern", "alpha_pattern", "lora_plus_ratio",
)  # fmt: skip
"""Settings of adapters that mean nothing to full fine-tuning. Ranks and alphas, which recipes set, are passed over."""


def problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for every setting of adapter and training that cannot take effect with this family."""
    try:
        family, weights = sizes.family_of_card(recipe.model), sizes.matrices(recipe.model)
    except RecipeError:
        yield from _dropout(recipe, None)
        return  # said elsewhere
    yield from _full(recipe)
    yield from _sharded(recipe)
    yield from _divided(recipe)
    if recipe.adapter.method == "full":
        yield from _targets(recipe, family)
        yield from _balance(recipe, family)
        return
    yield from _dropout(recipe, family)
    yield from _targets(recipe, family)
    yield from _dora(recipe, family)
    faults = [*_patterns(recipe, family, weights)]
    yield from faults or _beginning(recipe, family, weights)
    yield from _balance(recipe, family)


def _balance(recipe: Recipe, family: Family) -> Iterator[str]:
    if recipe.train.router_aux_loss_coef > 0 and not family.balances:
        yield (
            f"TRN-008 train.router_aux_loss_coef={recipe.train.router_aux_loss_coef:g}: no load-balancing loss "
            f"would be added for {family.key}. Set train.router_aux_loss_coef=0."
        )


def _sharded(recipe: Recipe) -> Iterator[str]:
    """What does not go with a base whose weights are split among devices."""
    launch, train, init = recipe.launch, recipe.train, recipe.adapter.init
    if launch.distribution != "fsdp2" or launch.nodes * launch.devices < 2:
        return
    if train.optimizer != "adamw":
        yield (
            f"OPT-002 train.optimizer={train.optimizer} with launch.distribution=fsdp2: it cannot update parts of "
            "weights. Set train.optimizer=adamw."
        )
    if init in (*sizes.SUBTRACTING, "eva"):
        yield (
            f"ADP-008 adapter.init={init} with launch.distribution=fsdp2: no process has the whole weights to begin "
            "from. Set adapter.init=default, or launch.distribution=ddp."
        )


def _divided(recipe: Recipe) -> Iterator[str]:
    """What does not go with optimizer states that are divided among devices wherever a device's share ends."""
    launch, optimizer = recipe.launch, recipe.train.optimizer
    divided = launch.distribution == "deepspeed" and launch.nodes * launch.devices > 1
    if divided and optimizer not in ("adamw", "lion"):
        yield (
            f"OPT-002 train.optimizer={optimizer} with launch.distribution=deepspeed: its state is one of whole rows "
            "or blocks, and ZeRO cuts through them; paged ones are untried. Set train.optimizer=adamw."
        )


def _full(recipe: Recipe) -> Iterator[str]:
    """What has no meaning, or no way yet, when the base's own weights are trained."""
    adapter, launch = recipe.adapter, recipe.launch
    if adapter.method != "full":
        if adapter.embeddings:
            yield (
                f"ADP-009 adapter.embeddings=true with adapter.method={adapter.method}: an adapter leaves "
                "embeddings and head as they are. Set adapter.embeddings=false, or adapter=full."
            )
        return
    if adapter.load_in_4bit:
        yield (
            "ADP-021 adapter.load_in_4bit=true with adapter.method=full: weights in 4 bits cannot be trained. "
            "Set adapter=full, which loads them in bf16, or adapter.method=lora."
        )
    usual = Adapter()
    for name in UPDATES_ONLY:
        value = getattr(adapter, name)
        if value != getattr(usual, name):
            yield (
                f"ADP-009 adapter.{name}={value} with adapter.method=full: it says how an update beside a weight is "
                "made, and there is none. Leave it out, or set adapter.method=lora."
            )
    if any(name.startswith("peft") for name in recipe.export.formats):
        yield (
            "EXP-009 export.formats: peft with adapter.method=full: there is no adapter to export, the weights "
            "themselves were trained. Set export=hf."
        )
    if launch.distribution == "fsdp2" and launch.nodes * launch.devices > 1:
        yield (
            "LCH-012 launch.distribution=fsdp2 with adapter.method=full: it has not been tried with weights that are "
            "trained themselves. Set launch.distribution=ddp, which holds all of them on every device."
        )


def _dropout(recipe: Recipe, family: Family | None) -> Iterator[str]:
    adapter = recipe.adapter
    if adapter.dropout > 0 and adapter.targets != "attention" and (family is None or family.experts):
        yield (
            f"ADP-002 adapter.dropout={adapter.dropout} must be 0 when adapter.targets={adapter.targets}: "
            "fused experts have no input to drop. Set adapter.dropout=0."
        )
    elif adapter.dropout > 0 and adapter.router:
        yield (
            f"ADP-002 adapter.dropout={adapter.dropout} must be 0 when adapter.router=true: PEFT adapts a router by "
            "its weight, which has no input to drop. Set adapter.dropout=0."
        )


def _targets(recipe: Recipe, family: Family) -> Iterator[str]:
    adapter = recipe.adapter
    if adapter.targets == "experts" and not family.experts:
        yield f"ADP-003 adapter.targets=experts: the family {family.key} has no experts. Set adapter.targets=all."
    if adapter.router and not family.router:
        yield f"ADP-004 adapter.router=true: the family {family.key} has no router. Set adapter.router=false."


def _dora(recipe: Recipe, family: Family) -> Iterator[str]:
    adapter = recipe.adapter
    if adapter.method != "dora" or not family.experts:
        return
    if adapter.targets != "attention":
        yield (
            f"ADP-006 adapter.method=dora with adapter.targets={adapter.targets}: PEFT has no DoRA for expert stacks, "
            f"nor for weights beside them ({family.key}). Set adapter.targets=attention, or adapter.method=lora."
        )
    elif adapter.router:
        yield (
            "ADP-006 adapter.method=dora with adapter.router=true: PEFT has no DoRA for routers. "
            "Set adapter.router=false, or adapter.method=lora."
        )


def _patterns(recipe: Recipe, family: Family, weights: list[Matrix]) -> Iterator[str]:
    adapter = recipe.adapter
    for key, rank in adapter.rank_pattern.items():
        if not 1 <= rank <= 4096:
            yield f"CHK-002 adapter.rank_pattern: {key}={rank} must be from 1 to 4096. Set a rank in that range."
    for key, alpha in adapter.alpha_pattern.items():
        if not (math.isfinite(alpha) and alpha > 0):
            yield f"CHK-002 adapter.alpha_pattern: {key}={alpha} must be above 0. Set a positive number."
    adapted = [m for m in weights if sizes.update_of(m, family, adapter)]
    # A weight that not all layers have is looked for in all of them; attaching knows better, and says so.
    names = [f"{start}{n}.{m.name}" for m in adapted for n in range(sizes.depth(weights)) for start in DOTTED]
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for key in patterns:
            try:
                found = any(sizes.pattern_of([key], name) for name in names)
            except re.error as error:
                yield f"ADP-005 adapter.{setting}: {key} is no regular expression: {error}. Mend it."
                continue
            if not found:
                ends = ", ".join(dict.fromkeys(m.name for m in adapted))
                yield f"ADP-005 adapter.{setting}: {key} fits no adapted weight. Paths end in: {ends}. Choose one."


def _beginning(recipe: Recipe, family: Family, weights: list[Matrix]) -> Iterator[str]:
    """What `adapter.init` asks of ranks and of the optimizer."""
    adapter, train, begins = recipe.adapter, recipe.train, f"adapter.init={recipe.adapter.init}"
    adapted = [
        (matrix.name, rank // sizes.width(adapter), min(matrix.rows, matrix.columns))
        for matrix in weights
        for rank in sizes.ranks(matrix, weights, family, adapter)
    ]
    odd = dict.fromkeys(name for name, rank, _ in adapted if rank % 2)
    wide = [(most, rank, name) for name, rank, most in adapted if rank > most]
    if adapter.init == "orthogonal" and odd:
        yield f"ADP-007 {begins} needs even ranks; that of {' and '.join(odd)} is odd. Set even ranks."
    if adapter.init == "eva":
        yield from _directions(adapter, weights, family)
    if adapter.init not in sizes.SUBTRACTING:
        return
    if wide:
        most, rank, name = min(wide)
        yield (
            f"ADP-007 {begins}: {name} has {most} directions, its rank is {rank}. "
            f"Set a rank of at most {most}, or adapter.init=default."
        )
    stays = "the half of the adapter that must stay as it is"
    if train.weight_decay > 0:
        what = f"ADP-008 train.weight_decay={train.weight_decay:g} with {begins}"
        yield f"{what}: it would also shrink {stays}. Set train.weight_decay=0."
    if train.optimizer.endswith("_8bit"):
        what = f"ADP-008 train.optimizer={train.optimizer} with {begins}"
        yield f"{what}: rounding its moments would move {stays}. Set train.optimizer=adamw."


def _directions(adapter: Adapter, weights: list[Matrix], family: Family) -> Iterator[str]:
    """PEFT looks for up to `eva_rho` times the rank of directions in what a map is given."""
    for matrix in weights:
        if sizes.update_of(matrix, family, adapter) != "weight" or matrix.group == "router":
            continue
        wanted = round(max(sizes.ranks(matrix, weights, family, adapter)) * adapter.eva_rho)
        if wanted > matrix.columns:
            yield (
                f"ADP-007 adapter.init=eva: {matrix.name} is given {matrix.columns} numbers, and rank x "
                f"adapter.eva_rho = {wanted}. Set a smaller adapter.rank, or adapter.eva_rho=1."
            )
            return
