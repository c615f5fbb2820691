"""What a finished training leaves: `finish(job)` writes adapter/ (or tuned/) and train.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.adapters import eva_summary
from finetune.compare import compare
from finetune.progress import peak_memory_gib
from finetune.recipe import Recipe
from finetune.record import versions
from finetune.rundir import RunDir, atomic_folder, read_json, write_json
from finetune.train import state as states
from finetune.train.job import Job
from finetune.train.learnt import unlearnt
from finetune.train.picture import draw_training
from finetune.whole import save


def finish(job: Job) -> None:
    """Looks at what was learnt and writes adapter/ (or tuned/) and train.json; only the first process writes."""
    trainer, rows, recipe, run_dir = job.trainer, job.rows, job.recipe, job.run_dir
    trained = states.trainable(trainer.model)
    weights = {name: states.own(states.whole(p.detach()).cpu()) for name, p in trained.items()}
    counts = {name: count.tolist() for name, count in job.heard.memory().items()}
    others = job.ranks.gather(counts)[1:]
    if not job.ranks.first:
        return
    for other in others:
        job.heard.add({name: torch.tensor(count) for name, count in other.items()})
    idle, heard = unlearnt(trainer.model, weights, job.begun)
    lengths = [len(ids) for ids in rows["input_ids"]]
    answers = [sum(label != -100 for label in labels) for labels in rows["labels"]]
    passes = job.steps * recipe.train.batch_size * recipe.train.accumulation * job.ranks.readers / len(rows)
    if job.begun:
        with atomic_folder(run_dir.tuned) as folder:
            save(folder, weights, {"base": recipe.model.source, "adapter": dataclasses.asdict(recipe.adapter)})
    else:
        with atomic_folder(run_dir.adapter) as folder:
            save_adapter(trainer.model, recipe.model.source, folder, weights)
    best = trainer.state.best_global_step if recipe.train.adapter_of == "best" else None
    chosen = best or trainer.state.global_step
    steps = [step | {"batch": batch} for step, batch in zip(job.progress.steps, job.boundary.digests, strict=True)]
    draw_training(run_dir.loss_plot, steps, f"{recipe.name}-{run_dir.path.name}")
    write_json(
        run_dir.train,
        {
            "steps": steps,
            "router": job.router.summary(),
            "rehearsal": job.rehearsal.measured,
            "rows": len(rows),
            "passes": round(passes, 3),
            "tokens": round(sum(lengths) * passes),
            "trainable_tokens": round(sum(answers) * passes),
            "seconds": round(sum(step["seconds"] for step in steps), 2),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "load_peak_gib": round(job.base.load_peak_gib, 4),
            "load_limit_gib": round(job.base.resident_gib + 2 * job.base.largest_group_gib, 4),
            "load_seconds": round(job.base.load_seconds, 2),
            "resident_gib": round(job.base.resident_gib, 6),
            # A training that goes on after its last update has no optimizer any more.
            **({"optimizer_gib": round(held_gib(trainer.optimizer), 6)} if trainer.optimizer else {}),
            "coverage": job.table,
            "beginning": begun(recipe, run_dir, trainer.model),
            "heldout": [
                {"step": entry["step"], "loss": entry["eval_loss"]}
                for entry in trainer.state.log_history
                if "eval_loss" in entry
            ],
            "adapter_of_step": chosen,
            "experts_without_update": idle,
            "expert_rows_with_a_gradient": heard,
            "engine": recipe.engine,
            "processes": job.ranks.world,
            "processes_per_row": job.ranks.sharing,
            "distribution": recipe.launch.distribution if job.ranks.world > 1 else "none",
            "resumed": job.resumed.memory(),
            "versions": versions(recipe.engine, recipe.launch.distribution),
            "seed": recipe.seed,
            "device": str(torch.get_default_device())
            if not torch.cuda.is_available()
            else torch.cuda.get_device_name(),
        },
    )
    tell_of_memory(job)


def held_gib(optimizer: Any) -> float:
    """GiB of the tensors in an optimizer's state; one that several parameters share counts once."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {id(value): value for value in states if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**30


def tell_of_memory(job: Job) -> None:
    """Prints what the plan of the run said of memory beside what was measured."""
    if job.run_dir.plan.exists():
        for row in compare(read_json(job.run_dir.plan), read_json(job.run_dir.train)):
            if row.unit == "GiB":
                job.console.print(row.sentence(), markup=False, highlight=False, soft_wrap=True)


def begun(recipe: Recipe, run_dir: RunDir, model: Any) -> dict[str, Any]:
    """How the adapter began, and with EVA the ranks that came of it."""
    found = load_file(run_dir.directions) if recipe.adapter.init == "eva" else {}
    return {"init": recipe.adapter.init} | (eva_summary(found, model) if found else {})


def save_adapter(model: Any, source: str, folder: Path, weights: dict[str, Any]) -> None:
    """Writes a PEFT adapter of these weights that names `source` as its base."""
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = source
    settings.target_modules = sorted(settings.target_modules)  # PEFT keeps sets: another order in every process
    settings.target_parameters = sorted(settings.target_parameters) if settings.target_parameters else None
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)  # none is trained
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template card; the export writes a real one
