"""How large a training is, and TRL's settings for a recipe."""

from __future__ import annotations

import math
from typing import Any

from finetune.families import Family
from finetune.recipe import Recipe, Train
from finetune.train.distribute import is_divided, is_sharded, sharding


def planned_steps(settings: Train, rows: int, readers: int = 1) -> int:
    """Optimizer updates of a run over `rows` training rows, of which so many batches are read at once."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_update = settings.batch_size * settings.accumulation * readers
    return max(1, math.ceil(rows * settings.epochs / per_update))


def save_every(settings: Train, steps: int) -> int:
    """Updates between two checkpoints."""
    return settings.save_steps or max(1, min(100, steps // 10))


def arithmetic(settings: Train, rows: int, steps: int, devices: int = 1, sharing: int = 1) -> str:
    """The size of the run as a sum a person can check; `sharing` of the devices hold a part each of the same rows."""
    per_update = settings.batch_size * settings.accumulation * (devices // sharing)
    seen, plural = steps * per_update, "s" if devices > 1 else ""
    shared = f" / {sharing} that share a row" if sharing > 1 else ""
    return (
        f"{devices} device{plural}{shared} x {settings.batch_size} rows x {settings.accumulation} accumulated = "
        f"{per_update} rows per update; {steps} updates x {per_update} = {seen} rows, {seen / rows:.2f} x {rows}"
    )


def loss_type(model: Any) -> str:
    """TRL's name for the cross-entropy: a chunk of trained tokens at a time, where TRL can reach below the head.

    TRL 1.14.2 goes through `model.base_model`, which is the model itself where a class names another prefix than its
    own (seen in transformers 5.17.0). Those compute all logits at once; the value is the same.
    """
    return "chunked_nll" if model.base_model is not model else "nll"


def trainer_settings(
    recipe: Recipe, output_dir: str, run_name: str, steps: int, every: int, loss: str, family: Family
) -> Any:
    """TRL's settings for a recipe: `steps` updates with a checkpoint after `every` of them.

    Trackers are callbacks of their own (`trackers`), behind those that measure.
    """
    import torch
    from trl import SFTConfig

    from finetune.train.optimizer import optimizer_name

    settings = recipe.train
    on_gpu, sharded = torch.cuda.is_available(), is_sharded(recipe)
    divided: dict[str, Any] = {}
    if is_divided(recipe):
        from finetune.train.zero import settings as zero_settings

        # The state is that of `distribute.join`: Accelerate alone would join no processes on a CPU.
        divided = {"deepspeed": zero_settings(settings), "accelerator_config": {"use_configured_state": True}}
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
        bf16=settings.precision == "bf16" and not divided,  # DeepSpeed would make the whole model bf16, scales included
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
        eval_strategy="steps" if settings.evaluate_steps else "no",
        eval_steps=settings.evaluate_steps or None,
        per_device_eval_batch_size=recipe.evaluate.batch_size,
        prediction_loss_only=True,
        metric_for_best_model="loss" if settings.evaluate_steps else None,
        greater_is_better=False,
        save_strategy="steps",
        save_steps=every,
        report_to=[],
        run_name=run_name,
        project=recipe.name,
        trackio_static_space_id=False,
        disable_tqdm=True,
        use_cpu=not on_gpu and not sharded,
        ddp_find_unused_parameters=False,
        fsdp=sharded,
        fsdp_config=sharding(family) if sharded else None,
        dataloader_pin_memory=on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        **divided,
    )
