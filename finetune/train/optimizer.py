"""The optimizer of a recipe, as transformers builds it: `optimizer_name`; `loraplus` where B learns faster than A."""

from __future__ import annotations

from typing import Any

from finetune.recipe import Train

NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adafactor": "adafactor",
}
"""`train.optimizer` -> the name that transformers knows it by. All but the first and the last are bitsandbytes'."""


def optimizer_name(settings: Train) -> str:
    """transformers' name of the optimizer."""
    return NAMES[settings.optimizer]


def loraplus(settings: Train, args: Any, ratio: float) -> tuple[Any, dict[str, Any]] | None:
    """What Trainer takes as `optimizer_cls_and_kwargs`, so that B learns `ratio` times as fast as A; None if it is 1.

    The first of them is a factory in transformers' sense: called without arguments it gives the function that makes the
    optimizer from the model. What that makes is an ordinary torch optimizer. LoRA+: arXiv 2402.12354.
    """
    if ratio == 1:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    options |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": settings.weight_decay}

    def make(model: Any, **options: Any) -> Any:
        return create_loraplus_optimizer(model, kind, **options)

    return (lambda: make), options
