"""What another engine than this program's own layers can train: `engine_problems(recipe)`, `engine_absent()`.

Unsloth is the only one. What stands here was read in the sources of the versions below; `train/with_unsloth.py` is the
only file that imports it, and only where nothing here objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.errors import RecipeError, WeightsError
from finetune.families import FAMILIES
from finetune.recipe import Recipe
from finetune.shards import quantisation_of
from finetune.sizes import family_of_card

PACKAGES = {"unsloth": "2026.10.5", "unsloth_zoo": "2026.10.5"}
"""Package -> the release that the facts in this file are about, as in the extra [unsloth] of pyproject.toml."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A setting that Unsloth does not carry out."""

    key: str
    """The setting."""
    meets: Callable[[Recipe], bool]
    """Whether a recipe has it so."""
    why: str
    """What Unsloth does instead."""
    instead: str
    """The value to set."""


LIMITS = (
    Limit(
        "adapter.double_quantisation",
        lambda r: r.adapter.load_in_4bit and not r.adapter.double_quantisation,
        "Unsloth always stores the maxima of NF4 in 8 bits too",
        "true",
    ),
    Limit(
        "adapter.targets",
        lambda r: r.adapter.targets == "all" and bool(family_of_card(r.model).experts),
        "with PEFT's own layers, which Unsloth builds on, shared and dense MLPs beside experts are left out",
        "experts",
    ),
    Limit("adapter.router", lambda r: r.adapter.router, "Unsloth's expert layers keep the router frozen", "false"),
    Limit("adapter.method", lambda r: r.adapter.method != "lora", "only LoRA is trained with it here", "lora"),
    Limit("adapter.rslora", lambda r: r.adapter.rslora, "its expert layers scale by alpha / rank", "false"),
    Limit("adapter.init", lambda r: r.adapter.init != "default", "Unsloth begins with B at zero", "default"),
    Limit("adapter.rank_pattern", lambda r: bool(r.adapter.rank_pattern), "experts have a rank of their own", "{}"),
    Limit("adapter.alpha_pattern", lambda r: bool(r.adapter.alpha_pattern), "experts have an alpha of their own", "{}"),
    Limit(
        "adapter.lora_plus_ratio",
        lambda r: r.adapter.lora_plus_ratio != 1,
        "the trainer it generates makes its own optimizer",
        "1",
    ),
    Limit("data.packing", lambda r: r.data.packing, "rows packed by this program would see each other", "false"),
    Limit("train.precision", lambda r: r.train.precision == "fp32", "Unsloth's kernels multiply in 16 bits", "bf16"),
    Limit("train.neftune_alpha", lambda r: r.train.neftune_alpha > 0, "its embeddings take no hook for noise", "0"),
    Limit(
        "train.router_aux_loss_coef",
        lambda r: r.train.router_aux_loss_coef > 0,
        "Unsloth's models return no such loss",
        "0",
    ),
    Limit(
        "train.checkpointed_layers",
        lambda r: r.train.checkpointed_layers > 0,
        "Unsloth recomputes all layers or none",
        "0",
    ),
    Limit("launch.devices", lambda r: r.launch.devices > 1, "Unsloth trains on one GPU here", "1"),
    Limit("launch.nodes", lambda r: r.launch.nodes > 1, "Unsloth trains on one machine here", "1"),
    Limit(
        "launch.distribution",
        lambda r: r.launch.distribution == "fsdp2",
        "Unsloth's 4-bit weights stay whole on one GPU",
        "ddp",
    ),
)
"""In the order of `recipe.py`."""


def engine_problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for every setting that the recipe's engine cannot carry out."""
    if recipe.engine != "unsloth":
        return
    try:
        family = family_of_card(recipe.model)
    except RecipeError:
        return  # said by check
    if not family.unsloth:
        known = ", ".join(sorted(key for key, one in FAMILIES.items() if one.unsloth))
        yield (
            f"ENG-001 engine=unsloth: Unsloth {PACKAGES['unsloth']} has no layers for the family {family.key} that "
            f"keep experts in 4 bits and adapters in PEFT's layout; it has for {known}. Set engine=finetune."
        )
    for limit in LIMITS:
        if limit.meets(recipe):
            yield (
                f"ENG-002 {limit.key}={_typed(recipe, limit.key)} with engine=unsloth: {limit.why}. "
                f"Set {limit.key}={limit.instead}, or engine=finetune."
            )


def engine_absent(gpus: int) -> Iterator[str]:
    """A sentence for everything that this machine, with so many NVIDIA GPUs, lacks for Unsloth. Does not import it."""
    if not gpus:
        yield (
            "ENG-003 engine=unsloth needs an NVIDIA GPU, and this machine has none. "
            "Set engine=finetune, which needs none, or run it on a machine with one."
        )
    for package, wanted in PACKAGES.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield (
                f"ENG-004 engine=unsloth: the package {package} is missing. "
                f"Type: pip install {package}=={wanted}, or set engine=finetune."
            )
            continue
        if version != wanted:
            yield (
                f"ENG-004 engine=unsloth: {package} {version} is installed, and another release may name and keep "
                f"adapters otherwise than {wanted}. Type: pip install {package}=={wanted}, or set engine=finetune."
            )


def engine_unfit(recipe: Recipe, folder: Path, config: Mapping[str, Any]) -> WeightsError | None:
    """The error of a base folder, by its config.json, that the recipe's engine cannot read as this program does."""
    if recipe.engine != "unsloth" or not (found := quantisation_of(config)):
        return None
    return WeightsError(
        "ENG-005",
        f"the weights in {folder} are quantised ({found['quant_method']})",
        "Unsloth would keep or convert them in its own way, which the merge does not know",
        "the unquantised files of this model, or engine=finetune",
    )


def _typed(recipe: Recipe, key: str) -> str:
    """The value of a dotted setting as one types it."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return str(value).lower() if isinstance(value, bool) else str(value)
