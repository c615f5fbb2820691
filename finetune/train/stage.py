"""Supervised fine-tuning of the adapter with TRL: `train(run_dir)` leaves adapter/ and train.json."""

from __future__ import annotations

import resource
import time
from tempfile import TemporaryDirectory

from finetune.compose import read_recipe
from finetune.errors import NumbersError
from finetune.record import versions
from finetune.rundir import RunDir, atomic_folder, write_json
from finetune.train.learnt import unlearnt
from finetune.train.optimizer import loraplus
from finetune.train.settings import arithmetic, loss_type, planned_steps, trainer_settings


def train(run_dir: RunDir) -> None:
    """Trains a new adapter on the run's training rows. A run whose adapter exists is left alone.

    Raises NumbersError on a loss or gradient that is not finite and on an adapter that does not learn.
    """
    import torch
    from rich.console import Console
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer

    from finetune.adapters import attach, coverage_table, keeping_fp32, print_coverage
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
        args = trainer_settings(recipe, scratch, str(run_dir.logs), steps, loss_type(base.model))
        with keeping_fp32(model):  # TRL casts the adapter of a 4-bit model to bf16
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=rows if packed is not None else rows.select_columns(["input_ids", "labels"]),
                data_collator=None if packed is None else PackedBatch(base.tokenizer.pad_token_id),
                processing_class=base.tokenizer,
                callbacks=[progress, Guard(), Recompute(recipe, base.family.block_class, console)],
                optimizer_cls_and_kwargs=loraplus(recipe.train, args, recipe.adapter.lora_plus_ratio),
            )
        trainer.remove_callback(PrinterCallback)  # prints each log as a dict; ours says the same in words
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


def peak_memory_gib() -> float:
    """Highest memory of this process: of the GPU when there is one, else resident host memory, in GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
