"""How large a training is, and TRL's settings for a recipe."""

from __future__ import annotations

import math
from typing import Any

from finetune.recipe import Recipe, Train


def planned_steps(settings: Train, rows: int) -> int:
    """Optimizer updates of a run over `rows` training rows."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_update = settings.batch_size * settings.accumulation
    return max(1, math.ceil(rows * settings.epochs / per_update))


def arithmetic(settings: Train, rows: int, steps: int) -> str:
    """The size of the run as a sum a person can check."""
    per_update = settings.batch_size * settings.accumulation
    return (
        f"1 device x {settings.batch_size} rows x {settings.accumulation} accumulated = {per_update} rows per update; "
        f"{steps} updates x {per_update} = {steps * per_update} rows, {steps * per_update / rows:.2f} x {rows}"
    )


def loss_type(model: Any) -> str:
    """TRL's name for the cross-entropy: a chunk of trained tokens at a time, where TRL can reach below the head.

    TRL 1.14.2 goes through `model.base_model`, which is the model itself where a class names another prefix than its
    own (seen in transformers 5.17.0). Those compute all logits at once; the value is the same.
    """
    return "chunked_nll" if model.base_model is not model else "nll"


def trainer_settings(recipe: Recipe, output_dir: str, logging_dir: str, steps: int, loss: str) -> Any:
    """TRL's settings for a recipe."""
    import os

    import torch
    from trl import SFTConfig

    from finetune.train.optimizer import optimizer_name

    settings = recipe.train
    on_gpu = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        optim=optimizer_name(settings),
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(steps * settings.warmup_fraction),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        neftune_noise_alpha=settings.neftune_alpha or None,
        loss_type=loss,
        max_length=None,  # rows were measured and refused when they were prepared
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=["tensorboard"] if settings.tensorboard else [],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )
