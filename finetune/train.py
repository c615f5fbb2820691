"""Supervised fine-tuning of the adapter with TRL: `train(run_dir)` leaves adapter/ and train.json."""

from __future__ import annotations

import math
import resource
import time
from tempfile import TemporaryDirectory
from typing import Any

from finetune.compose import read_recipe
from finetune.errors import NumbersError
from finetune.recipe import Recipe, Train
from finetune.record import versions
from finetune.rundir import RunDir, atomic_folder, write_json


def train(run_dir: RunDir) -> None:
    """Trains a new adapter on the run's training rows. A run whose adapter exists is left alone.

    Raises NumbersError on a loss or gradient that is not finite and on an adapter that does not learn.
    """
    import torch
    from rich.console import Console
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer

    from finetune.adapters import attach, coverage_table, print_coverage, to_fp32
    from finetune.base import load_base
    from finetune.data import PackedBatch, load_packed, load_splits
    from finetune.progress import Guard, TrainingProgress
    from finetune.recompute import Recompute
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    console = Console()
    packed = load_packed(run_dir)
    rows = load_splits(run_dir).train if packed is None else packed
    base = load_base(
        base_folder(recipe),
        load_in_4bit=recipe.adapter.load_in_4bit,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation,
    )
    console.print(base.loading())
    set_seed(recipe.seed)  # TRL 1.14.2 seeds after the adapter is made; the same seed would give another LoRA
    model = attach(base, recipe.adapter)
    table = coverage_table(model, base.family)
    print_coverage(table, console)

    steps = planned_steps(recipe.train, len(rows))
    console.print(arithmetic(recipe.train, len(rows), steps))
    progress = TrainingProgress(console, steps)
    with TemporaryDirectory(prefix="finetune-") as scratch:
        trainer = SFTTrainer(
            model=model,
            args=trainer_settings(recipe, scratch, str(run_dir.logs), steps, loss_type(base.model)),
            train_dataset=rows if packed is not None else rows.select_columns(["input_ids", "labels"]),
            data_collator=None if packed is None else PackedBatch(base.tokenizer.pad_token_id),
            processing_class=base.tokenizer,
            callbacks=[progress, Guard(), Recompute(recipe, base.family.block_class, console)],
        )
        trainer.remove_callback(PrinterCallback)  # prints each log as a dict; ours says the same in words
        to_fp32(trainer.model)  # TRL casts the adapter of a 4-bit model to bf16
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    done = trainer.state.global_step
    if done != steps:
        raise NumbersError("TRN-003", f"training stopped at step {done} of {steps}", "", "the same command again")
    idle, heard = unlearnt(trainer.model)
    lengths = [len(ids) for ids in rows["input_ids"]]
    answers = [sum(label != -100 for label in labels) for labels in rows["labels"]]
    passes = steps * recipe.train.batch_size * recipe.train.accumulation / len(rows)
    with atomic_folder(run_dir.adapter) as folder:
        settings = trainer.model.peft_config["default"]
        settings.base_model_name_or_path = recipe.model.source
        settings.target_modules = sorted(settings.target_modules)  # PEFT keeps sets: another order in every process
        settings.target_parameters = sorted(settings.target_parameters) if settings.target_parameters else None
        trainer.model.save_pretrained(folder, save_embedding_layers=False)  # none is trained
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template card; the export writes a real one
    write_json(
        run_dir.train,
        {
            "steps": progress.steps,
            "rows": len(rows),
            "passes": round(passes, 3),
            "tokens": round(sum(lengths) * passes),
            "trainable_tokens": round(sum(answers) * passes),
            "seconds": round(seconds, 2),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "load_peak_gib": round(base.load_peak_gib, 4),
            "load_limit_gib": round(base.resident_gib + 2 * base.largest_group_gib, 4),
            "load_seconds": round(base.load_seconds, 2),
            "resident_gib": round(base.resident_gib, 4),
            "coverage": table,
            "experts_without_update": idle,
            "expert_rows_with_a_gradient": heard,
            "versions": versions(),
            "seed": recipe.seed,
            "device": str(torch.get_default_device())
            if not torch.cuda.is_available()
            else torch.cuda.get_device_name(),
        },
    )


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

    settings = recipe.train
    on_gpu = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
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


def unlearnt(model: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(stack -> experts whose update is still zero, experts module -> rows with a gradient that each expert got).

    An expert that no such row reached is the one honest reason for an update of zero. Raises NumbersError: TRN-002 when
    a weight that every token uses did not change, TRN-004 when an expert that was reached did not.
    """
    from finetune.experts import ExpertsLora

    idle: dict[str, list[int]] = {}
    heard: dict[str, list[int]] = {}
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, ExpertsLora)}
    dead = [
        name.removesuffix(".lora_B.default.weight")
        for name, parameter in model.named_parameters()
        if name.endswith(".lora_B.default.weight")
        and name.removesuffix(".lora_B.default.weight") not in stacks
        and not bool(parameter.detach().any())
    ]
    if dead:
        raise NumbersError(
            "TRN-002", f"{len(dead)} adapted weights did not change, e.g. {dead[0]}", "", "a larger train.lr"
        )
    for name, module in stacks.items():
        rows = module.rows_with_a_gradient()
        silent = module.experts_without_update("default")
        wrong = [expert for expert in silent if rows[expert]]
        if wrong:
            raise NumbersError(
                "TRN-004",
                f"{module.parameter_name} of {name}: experts {wrong[:5]} got gradients and did not change",
                f"expert {wrong[0]} got {rows[wrong[0]]} rows",
                "a larger train.lr",
            )
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        heard[path] = rows
        if silent:
            idle[f"{path}.{module.parameter_name}"] = silent
    return idle, heard


def peak_memory_gib() -> float:
    """Highest memory of this process: of the GPU when there is one, else resident host memory, in GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
