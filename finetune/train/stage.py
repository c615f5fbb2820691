"""Supervised fine-tuning of the adapter with TRL: `train(run_dir)` leaves adapter/ and train.json."""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory

from finetune.compose import read_recipe
from finetune.errors import NumbersError
from finetune.record import versions
from finetune.rundir import RunDir, atomic_folder, write_json
from finetune.train.learnt import unlearnt
from finetune.train.settings import arithmetic, loss_type, planned_steps, trainer_settings


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
    from finetune.progress import Guard, TrainingProgress, peak_memory_gib
    from finetune.recompute import Recompute
    from finetune.source import base_folder
    from finetune.train.picture import draw_training
    from finetune.train.rehearsal import Rehearsal
    from finetune.train.router_load import RouterLoad
    from finetune.train.trackers import tracking

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
    name = f"{recipe.name}-{run_dir.path.name}"
    rehearsal, router = Rehearsal(recipe, run_dir, console), RouterLoad(console)
    watched = TrainingProgress(console, steps), tracking(recipe, run_dir.logs)
    with watched[0] as progress, watched[1] as trackers, TemporaryDirectory(prefix="finetune-") as scratch:
        trainer = SFTTrainer(
            model=model,
            args=trainer_settings(recipe, scratch, name, steps, loss_type(base.model)),
            train_dataset=rows if packed is not None else rows.select_columns(["input_ids", "labels"]),
            data_collator=None if packed is None else PackedBatch(base.tokenizer.pad_token_id),
            processing_class=base.tokenizer,
            # In this order: what is rehearsed is not counted, and trackers log what the others have measured.
            callbacks=[
                Guard(),
                Recompute(recipe, base.family.block_class, console),
                rehearsal,
                router,
                progress,
                *trackers,
            ],
        )
        rehearsal.trainer = trainer
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
    draw_training(run_dir.loss_plot, progress.steps, name)
    write_json(
        run_dir.train,
        {
            "steps": progress.steps,
            "router": router.summary(),
            "rehearsal": rehearsal.measured,
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
