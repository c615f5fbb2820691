"""The training stage: `train(run_dir)` leaves adapter/ and train.json, and checkpoints on the way."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune import checkpoints
from finetune.compose import read_recipe
from finetune.errors import Preempted, RunError
from finetune.ranks import Ranks, expected
from finetune.recipe import Recipe
from finetune.record import versions
from finetune.rundir import RunDir, atomic_folder, read_json, write_json, write_text
from finetune.stop import asked_to_stop
from finetune.train.identity import changes, identity
from finetune.train.learnt import Heard, unlearnt
from finetune.train.settings import arithmetic, loss_type, planned_steps, save_every, trainer_settings
from finetune.train.with_unsloth import for_trainer, load, take_over


def train(run_dir: RunDir) -> None:
    """Trains a new adapter on the run's training rows, from the newest whole checkpoint if there is one.

    With several processes every one of them calls it. Raises Preempted when a signal asked to stop (a checkpoint and
    REQUEUE are written then), RunError when the run is not what its checkpoint was of, NumbersError on a loss or
    gradient that is not finite and on an adapter that does not learn.
    """
    from rich.console import Console

    recipe = read_recipe(run_dir.recipe)
    first = expected()[0] == 0
    if first:
        run_dir.requeue.unlink(missing_ok=True)
    with ExitStack() as stack:
        request = stack.enter_context(asked_to_stop())
        scratch = stack.enter_context(TemporaryDirectory(prefix="finetune-"))
        job = _prepare(recipe, run_dir, scratch, Console(quiet=not first), request)
        try:
            _run(job)
        except Preempted as stopped:
            if first:
                write_text(run_dir.requeue, f"{stopped.signal} after step {stopped.step} of {stopped.steps}\n")
            raise
        error = None
        try:
            _finish(job)
        except BaseException as raised:
            error = raised
        job.ranks.agree(error)


@dataclass(slots=True)
class _Job:
    """A training that is ready to run."""

    recipe: Recipe
    run_dir: RunDir
    ranks: Ranks
    base: Any
    trainer: Any
    rows: Any
    steps: int
    table: list[dict[str, Any]]
    progress: Any
    boundary: Any
    heard: Heard
    resumed: _Resumed
    console: Any


def _prepare(recipe: Recipe, run_dir: RunDir, scratch: str, console: Any, request: Any) -> _Job:
    """Base, adapter, rows and trainer of this process."""
    unsloth = recipe.engine == "unsloth"
    if unsloth:
        take_over(Path(scratch))
    from transformers import PrinterCallback

    from finetune.adapters import coverage_table, print_coverage, to_fp32
    from finetune.data import load_packed, load_splits
    from finetune.progress import Guard, TrainingProgress
    from finetune.recompute import Recompute
    from finetune.source import base_folder
    from finetune.train.distribute import as_stored, is_sharded, join, require_ranks
    from finetune.train.order import Order
    from finetune.train.trainer import Boundary, Keeping, Trainer

    ranks = join(recipe)
    folder = base_folder(recipe)
    packed = load_packed(run_dir)
    rows = load_splits(run_dir).train if packed is None else packed
    base, model = load(recipe, folder) if unsloth else _load(recipe, folder)
    console.print(base.loading())
    table = coverage_table(model, base.family)
    print_coverage(table, console)

    steps = planned_steps(recipe.train, len(rows), ranks.world)
    console.print(arithmetic(recipe.train, len(rows), steps, ranks.world))
    progress, heard = TrainingProgress(console, steps), Heard(model)
    boundary = Boundary(ranks, request, _names(rows, packed is not None))
    resumed = _Resumed()
    about = identity(recipe, run_dir, folder, ranks.world)
    keeping = Keeping(
        root=run_dir.checkpoints,
        newest=recipe.train.keep_checkpoints,
        about=about,
        kept={"progress": progress, "batches": boundary, "resumed": resumed},
        counted={"heard": heard},
    )
    lengths = [len(ids) for ids in rows["input_ids"]] if recipe.train.group_by_length else None
    per_update = recipe.train.batch_size * recipe.train.accumulation * ranks.world
    every = save_every(recipe.train, steps)
    trainer = Trainer(
        keeping=keeping,
        ranks=ranks,
        order=Order(len(rows), recipe.seed, lengths, per_update),
        model=model,
        args=trainer_settings(
            for_trainer(recipe) if unsloth else recipe,
            scratch,
            str(run_dir.logs),
            steps,
            every,
            "nll" if unsloth else loss_type(base.model),  # Unsloth has a cross-entropy in pieces of its own
            base.family,
        ),
        train_dataset=_numbered(rows, packed is not None),
        data_collator=_collator(base.tokenizer, packed is not None),
        processing_class=base.tokenizer,
        callbacks=[boundary, progress, Guard(), Recompute(recipe, base.family.block_class, console)],
    )
    boundary.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # prints each log as a dict; ours says the same in words
    to_fp32(trainer.model)  # TRL casts the adapter of a 4-bit model to bf16
    require_ranks(trainer, recipe, ranks)
    if is_sharded(recipe):
        as_stored(trainer)
    return _Job(recipe, run_dir, ranks, base, trainer, rows, steps, table, progress, boundary, heard, resumed, console)


def _load(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """(base, its PEFT model with a new adapter) in our own layers."""
    from transformers import set_seed

    from finetune.adapters import attach
    from finetune.base import load_base
    from finetune.train.distribute import is_sharded

    base = load_base(
        folder,
        load_in_4bit=recipe.adapter.load_in_4bit,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation,
        sharded=is_sharded(recipe),
    )
    set_seed(recipe.seed)  # TRL 1.14.2 seeds after the adapter is made; the same seed would give another LoRA
    return base, attach(base, recipe.adapter)


def _run(job: _Job) -> None:
    """Trains to the last step, or raises Preempted with a checkpoint written."""
    found = checkpoints.newest(job.run_dir.checkpoints)
    for sentence in found.passed_over:
        job.console.print(f"checkpoint passed over: {sentence}", markup=False, highlight=False, soft_wrap=True)
    trainer, start = job.trainer, found.checkpoint
    steps = job.ranks.gather(start.step if start else 0)
    if len(set(steps)) > 1:
        raise RunError(
            "CKP-004", f"the processes see other checkpoints: steps {steps}", "", "a runs_dir that all share"
        )
    if start is None:
        trainer.train()
    else:
        allowed = [*job.recipe.train.allow_changed, *_allowed(job.run_dir)]
        changed = changes(start.about, trainer.keeping.about, allowed)
        job.console.print(
            f"going on after step {start.step} of {job.steps}, from {start.path.name}"
            + "".join(f"; allowed: {name}: {what}" for name, what in changed.items()),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        job.resumed.now = {"after_step": start.step, "passed_over": found.passed_over, "changed": changed}
        if start.step < job.steps:
            trainer.train(resume_from_checkpoint=str(start.path))
        else:
            trainer.restore(start.path)
    if trainer.state.global_step < job.steps:
        raise Preempted(job.boundary.stopped_by, trainer.state.global_step, job.steps)


def _finish(job: _Job) -> None:
    """Looks at what was learnt and writes adapter/ and train.json; only the first process writes."""
    import torch

    from finetune.train import state as states

    trainer, rows, recipe, run_dir = job.trainer, job.rows, job.recipe, job.run_dir
    weights = {name: states.whole(p.detach()).cpu() for name, p in states.trainable(trainer.model).items()}
    counts = {name: count.tolist() for name, count in job.heard.memory().items()}
    others = job.ranks.gather(counts)[1:]
    if not job.ranks.first:
        return
    for other in others:
        job.heard.add({name: torch.tensor(count) for name, count in other.items()})
    idle, heard = unlearnt(trainer.model, weights)
    lengths = [len(ids) for ids in rows["input_ids"]]
    answers = [sum(label != -100 for label in labels) for labels in rows["labels"]]
    passes = job.steps * recipe.train.batch_size * recipe.train.accumulation * job.ranks.world / len(rows)
    with atomic_folder(run_dir.adapter) as folder:
        save_adapter(trainer.model, recipe.model.source, folder, weights)
    steps = [step | {"batch": batch} for step, batch in zip(job.progress.steps, job.boundary.digests, strict=True)]
    write_json(
        run_dir.train,
        {
            "steps": steps,
            "rows": len(rows),
            "passes": round(passes, 3),
            "tokens": round(sum(lengths) * passes),
            "trainable_tokens": round(sum(answers) * passes),
            "seconds": round(sum(step["seconds"] for step in steps), 2),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "load_peak_gib": round(job.base.load_peak_gib, 4),
            "load_limit_gib": round(job.base.resident_gib + 2 * job.base.largest_group_gib, 4),
            "load_seconds": round(job.base.load_seconds, 2),
            "resident_gib": round(job.base.resident_gib, 4),
            "coverage": job.table,
            "experts_without_update": idle,
            "expert_rows_with_a_gradient": heard,
            "engine": recipe.engine,
            "processes": job.ranks.world,
            "distribution": recipe.launch.distribution if job.ranks.world > 1 else "none",
            "resumed": job.resumed.memory(),
            "versions": versions(recipe.engine),
            "seed": recipe.seed,
            "device": str(torch.get_default_device())
            if not torch.cuda.is_available()
            else torch.cuda.get_device_name(),
        },
    )


def save_adapter(model: Any, source: str, folder: Path, weights: dict[str, Any]) -> None:
    """Writes a PEFT adapter of these weights that names `source` as its base."""
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = source
    settings.target_modules = sorted(settings.target_modules)  # PEFT keeps sets: another order in every process
    settings.target_parameters = sorted(settings.target_parameters) if settings.target_parameters else None
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)  # none is trained
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template card; the export writes a real one


class _Resumed:
    """Every time the run went on from a checkpoint."""

    def __init__(self) -> None:
        self.earlier: list[dict[str, Any]] = []
        self.now: dict[str, Any] | None = None

    def memory(self) -> list[dict[str, Any]]:
        """All of them, for a checkpoint."""
        return [*self.earlier, *([self.now] if self.now else [])]

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Takes up those before this one."""
        self.earlier = list(memory)


def _numbered(rows: Any, packed: bool) -> Any:
    """The columns that training reads, with the number of each row."""
    from finetune.train.batch import NUMBER

    columns = ["input_ids", "labels", *(["position_ids"] if packed else [])]
    return rows.select_columns(columns).add_column(NUMBER, list(range(len(rows))))


def _collator(tokenizer: Any, packed: bool) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from finetune.data import PackedBatch
    from finetune.train.batch import Numbered

    pad = tokenizer.pad_token_id
    return Numbered(PackedBatch(pad) if packed else DataCollatorForLanguageModeling(pad_token_id=pad))


def _names(rows: Any, packed: bool) -> Callable[[list[int]], list[str]]:
    """Row numbers -> what a person can look up."""
    return lambda numbers: [f"sequence {n} of packed.arrow" if packed else str(rows[n]["row"]) for n in numbers]


def _allowed(run_dir: RunDir) -> list[str]:
    """Changes allowed beside run=, since the run began."""
    return [name for entry in read_json(run_dir.allowed) for name in entry["names"]] if run_dir.allowed.exists() else []


def peak_memory_gib() -> float:
    """Highest memory of this process: of the GPU when there is one, else resident host memory, in GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
