"""Which rows several devices can share, a part each (`launch.context_parallel`): `problems(recipe)`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune import sizes
from finetune.errors import RecipeError
from finetune.families import Family, shapes
from finetune.recipe import Recipe

STRETCHED = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the length of the row, of which a process sees a part only."""


def problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for everything that cannot be when several devices share a row; called by `check`.

    LCH-013 is about the devices and the model, LCH-014 about a setting beside it.
    """
    launch, train = recipe.launch, recipe.train
    sharing = launch.context_parallel
    if sharing < 2:
        return
    if launch.devices % sharing:
        yield (
            f"LCH-013 launch.context_parallel={sharing} with launch.devices={launch.devices}: so many devices of one "
            f"machine share a row. Set launch.devices={max(1, round(launch.devices / sharing)) * sharing}, or "
            "launch.context_parallel=1."
        )
    try:
        family, config = sizes.family_of_card(recipe.model), sizes.shape_config(recipe.model)
    except RecipeError:
        return  # said elsewhere
    if why := undivided(family, config, sharing):
        yield f"LCH-013 launch.context_parallel={sharing}: {why}. Set {instead(config, sharing)}."
    if train.router_aux_loss_coef > 0:
        yield (
            f"LCH-014 train.router_aux_loss_coef={train.router_aux_loss_coef:g} with launch.context_parallel="
            f"{sharing}: each device would balance its part of a row alone. Set train.router_aux_loss_coef=0."
        )
    if train.neftune_alpha > 0:
        yield (
            f"LCH-014 train.neftune_alpha={train.neftune_alpha:g} with launch.context_parallel={sharing}: noise is "
            "scaled by the length that a device sees. Set train.neftune_alpha=0."
        )


def undivided(family: Family, config: Mapping[str, Any], sharing: int) -> str:
    """Why so many devices cannot share a row of a model, from the text part of its config.json; empty where they can.

    Each of them computes the attention of its part of the heads, over the whole row.
    """
    if family.undivided:
        return f"{family.key} cannot be divided along a row: {family.undivided}"
    heads = shapes.stated(config, "num_attention_heads", absent=sharing)
    keys = shapes.stated(config, "num_key_value_heads", absent=heads)
    if heads % sharing or keys % sharing:
        return f"{heads} heads of queries and {keys} of keys and values cannot be divided by {sharing}"
    window = shapes.stated(config, "sliding_window", absent=0)
    if window and shapes.stated(config, "use_sliding_window", absent=True):
        return f"its attention looks back over a window of {window:,} tokens (sliding_window)"
    rotary = {**shapes.stated(config, "rope_scaling", absent={}), **shapes.stated(config, "rope_parameters", absent={})}
    kind = shapes.stated(rotary, "rope_type", "type", absent="default")
    if kind in STRETCHED:
        return f"its positions depend on the length of the row (rope_type={kind})"
    return ""


def instead(config: Mapping[str, Any], sharing: int) -> str:
    """What to type where `undivided` gave a reason."""
    heads = shapes.stated(config, "num_attention_heads", absent=1)
    keys = shapes.stated(config, "num_key_value_heads", absent=heads)
    fits = max(n for n in range(1, sharing) if heads % n == 0 and keys % n == 0)
    other = f"{fits}, or 1" if fits > 1 and (heads % sharing or keys % sharing) else "1"
    return (
        f"launch.context_parallel={other}; long rows fit by train.gradient_checkpointing=true, train.batch_size=1 and "
        "launch=fsdp2 too"
    )
