"""The training stage: `train(run_dir)` leaves adapter/ and train.json, and checkpoints on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune import checkpoints
from finetune.compose import read_recipe
from finetune.errors import Preempted, RunError
from finetune.ranks import Part, Ranks, expected
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json, write_text
from finetune.stop import Request, asked_to_stop
from finetune.train.identity import changes, identity
from finetune.train.job import Job, Resumed
from finetune.train.learnt import Heard
from finetune.train.settings import arithmetic, loss_type, planned_steps, save_every, trainer_settings
from finetune.train.with_unsloth import for_trainer, load, take_over


def train(run_dir: RunDir) -> None:
    """Trains a new adapter on the run's training rows, from the newest whole checkpoint if there is one.

    With several processes every one of them calls it. Raises Preempted when a signal asked to stop (a checkpoint and
    REQUEUE are written then; after the last update the adapter, too), RunError when the run is not what its checkpoint
    was of, NumbersError on a loss or gradient that is not finite and on an adapter that does not learn.
    """
    from rich.console import Console

    recipe = read_recipe(run_dir.recipe)
    first = expected()[0] == 0
    if first:
        run_dir.requeue.unlink(missing_ok=True)
    with ExitStack() as stack:
        request = stack.enter_context(asked_to_stop())
        scratch = stack.enter_context(TemporaryDirectory(prefix="finetune-"))
        if recipe.engine == "unsloth":
            take_over(Path(scratch))  # before anything below imports transformers
        from finetune.train.distribute import join
        from finetune.train.results import finish
        from finetune.train.trackers import tracking

        ranks = join(recipe)
        with ranks.one_for_all():
            trackers = stack.enter_context(tracking(recipe, run_dir.logs))
            console = Console(quiet=not first)
            job = prepare(recipe, run_dir, ranks, scratch, console, request, trackers if first else ())
            stack.enter_context(job.progress)
        try:
            _run(job)
            with ranks.one_for_all():
                finish(job)
            # Too late to end the training, not too late for what comes after it.
            if signal := next(filter(None, ranks.gather(request.signal)), ""):
                raise Preempted(signal, job.steps, job.steps)
        except Preempted as stopped:
            if first:
                write_text(run_dir.requeue, f"{stopped.signal} after step {stopped.step} of {stopped.steps}\n")
            raise


def prepare(
    recipe: Recipe,
    run_dir: RunDir,
    ranks: Ranks,
    scratch: str,
    console: Any,
    request: Request,
    trackers: Sequence[Any] = (),
) -> Job:
    """Base, adapter, rows and trainer of this process."""
    from transformers import PrinterCallback

    from finetune.adapters import coverage_table, keeping_fp32, print_coverage
    from finetune.data import load_packed, load_splits, require_rows
    from finetune.progress import Guard, TrainingProgress
    from finetune.recompute import Recompute
    from finetune.source import base_folder
    from finetune.train.beginning import beginning
    from finetune.train.distribute import as_stored, is_divided, is_sharded, require_ranks
    from finetune.train.optimizer import loraplus
    from finetune.train.order import Order
    from finetune.train.parts import Parts
    from finetune.train.rehearsal import Rehearsal
    from finetune.train.router_load import RouterLoad
    from finetune.train.rows import collator, heldout, names, numbered
    from finetune.train.shared_rows import SharedRows, require_shareable
    from finetune.train.trainer import Boundary, Keeping, Trainer
    from finetune.whole import fingerprints

    def base_and_rows() -> Path:
        if ranks.first:
            require_rows(run_dir, recipe)
        return base_folder(recipe)

    unsloth, folder = recipe.engine == "unsloth", ranks.in_turn(base_and_rows)
    require_shareable(folder, ranks)
    packed = load_packed(run_dir)
    rows = load_splits(run_dir).train if packed is None else packed
    whole = recipe.adapter.method == "full"

    def begin(base: Any) -> Any:
        return beginning(recipe, run_dir, base, rows, packed is not None, ranks)

    part = Part(ranks.rank, ranks.world) if is_sharded(recipe) else None
    base, model = (
        load(recipe, folder) if unsloth else _whole(recipe, folder) if whole else _load(recipe, folder, part, begin)
    )
    shared = SharedRows(ranks, base.model) if ranks.sharing > 1 else None
    console.print(base.loading())
    table = coverage_table(model, base.family)
    print_coverage(table, console)

    steps = planned_steps(recipe.train, len(rows), ranks.readers)
    console.print(arithmetic(recipe.train, len(rows), steps, ranks.world, ranks.sharing))
    name = f"{recipe.name}-{run_dir.path.name}"
    progress, heard, router = TrainingProgress(console, steps, ranks), Heard(model), RouterLoad(console)
    begun = fingerprints(model) if whole else {}
    rehearsal = Rehearsal(recipe, run_dir, console, ranks)
    boundary = Boundary(ranks, request, names(rows, packed is not None), run_dir.batches)
    resumed = Resumed()
    about = identity(recipe, run_dir, folder, ranks.world, ranks.sharing)
    keeping = Keeping(
        root=run_dir.checkpoints,
        newest=recipe.train.keep_checkpoints,
        about=about,
        kept={"progress": progress, "batches": boundary, "resumed": resumed},
        damaged=set(),
        counted={"heard": heard, "router": router},
    )
    lengths = [len(ids) for ids in rows["input_ids"]] if recipe.train.group_by_length else None
    per_update = recipe.train.batch_size * recipe.train.accumulation * ranks.readers
    every = save_every(recipe.train, steps)
    told, loss = (for_trainer(recipe), "nll") if unsloth else (recipe, loss_type(base.model))  # it has a loss in pieces
    args = trainer_settings(told, scratch, name, steps, every, loss, base.family)
    # In this order: what is rehearsed is not counted, and trackers log what the others have measured.
    guard = [] if is_divided(recipe) else [Guard()]  # ZeRO's own handle looks at gradients: they are gone afterwards
    recompute = Recompute(recipe, base.family.block_class, console, ranks)
    callbacks = [boundary, *guard, recompute, rehearsal, router, progress]
    with keeping_fp32(model):  # TRL casts the adapter of a 4-bit model to bf16
        trainer = Trainer(
            keeping=keeping,
            ranks=ranks,
            shared=shared,
            in_bf16=recipe.train.precision == "bf16" and (is_sharded(recipe) or is_divided(recipe)),
            order=Order(len(rows), recipe.seed, lengths, per_update),
            model=model,
            args=args,
            train_dataset=numbered(rows, packed is not None),
            eval_dataset=heldout(recipe, run_dir),
            data_collator=collator(base.tokenizer),
            processing_class=base.tokenizer,
            callbacks=[*([Parts(model)] if is_sharded(recipe) else []), *callbacks, *trackers],
            optimizer_cls_and_kwargs=loraplus(recipe.train, args, recipe.adapter.lora_plus_ratio),
        )
    rehearsal.trainer = trainer
    boundary.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # prints each log as a dict; ours says the same in words
    require_ranks(trainer, recipe, ranks)
    if is_sharded(recipe):
        as_stored(trainer)
    return Job(
        recipe=recipe,
        run_dir=run_dir,
        ranks=ranks,
        base=base,
        trainer=trainer,
        rows=rows,
        steps=steps,
        table=table,
        progress=progress,
        boundary=boundary,
        heard=heard,
        begun=begun,
        router=router,
        rehearsal=rehearsal,
        resumed=resumed,
        console=console,
    )


def _load(recipe: Recipe, folder: Path, part: Part | None, begin: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(base, its PEFT model with a new adapter) in our own layers; `begin(base)` gives the adapter's first values."""
    from transformers import set_seed

    from finetune.adapters import attach
    from finetune.base import load_base

    base = load_base(
        folder,
        load_in_4bit=recipe.adapter.load_in_4bit,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation,
        part=part,
    )
    found = begin(base)
    set_seed(recipe.seed)  # TRL 1.14.2 seeds after the adapter is made; the same seed would give another LoRA
    return base, attach(base, recipe.adapter, found)


def _whole(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """(base, its model with those of its own weights trainable that the recipe names)."""
    from transformers import set_seed

    from finetune.base import load_base
    from finetune.whole import begin, exact_precision

    precision = recipe.train.precision
    base = load_base(folder, load_in_4bit=False, precision=exact_precision(folder, precision))
    set_seed(recipe.seed)
    return base, begin(base, recipe.adapter, precision)


def _run(job: Job) -> None:
    """Trains to the last step, or raises Preempted with a checkpoint written."""
    found = checkpoints.newest(job.run_dir.checkpoints)
    for sentence in found.passed_over:
        job.console.print(f"checkpoint passed over: {sentence}", markup=False, highlight=False, soft_wrap=True)
    trainer, start = job.trainer, found.checkpoint
    trainer.keeping.damaged = found.damaged
    steps = job.ranks.gather(start.step if start else 0)
    if len(set(steps)) > 1:
        raise RunError(
            "CKP-004", f"the processes see other checkpoints: steps {steps}", "", "a runs_dir that all share"
        )
    if start is None:
        trainer.train()
    else:
        from finetune.record import note_inputs
        from finetune.source import base_folder

        allowed = [*job.recipe.train.allow_changed, *_allowed(job.run_dir)]
        changed = changes(start.about, trainer.keeping.about, allowed, str(job.run_dir.path))
        job.console.print(
            f"going on after step {start.step} of {job.steps}, from {start.path.name}"
            + "".join(f"; allowed: {name}: {what}" for name, what in changed.items()),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        job.resumed.now = {"after_step": start.step, "passed_over": found.passed_over, "changed": changed}
        if "base" in changed and job.ranks.first:
            note_inputs(job.run_dir, job.recipe, base_folder(job.recipe))  # those of today go into the record
        if start.step < job.steps:
            trainer.train(resume_from_checkpoint=str(start.path))
        else:
            trainer.restore(start.path)
    if trainer.state.global_step < job.steps:
        raise Preempted(job.boundary.stopped_by, trainer.state.global_step, job.steps)
    if job.recipe.train.adapter_of == "best" and trainer.state.best_global_step:
        with job.ranks.one_for_all():
            best = _best(job.run_dir, trainer.state.best_global_step)
        trainer.take_weights(best)


def _best(run_dir: RunDir, step: int) -> Path:
    """The checkpoint that becomes the adapter. Raises RunError (CKP-006) when it is not as it was written."""
    folder = run_dir.checkpoints / checkpoints.folder_name(step)
    if wrong := checkpoints.faults(folder, step):
        raise RunError(
            "CKP-006",
            f"{folder}: {wrong[0]}",
            f"train.adapter_of=best: the adapter would be that of step {step}, with the lowest held-out loss",
            f"python -m finetune run={run_dir.path} train.adapter_of=last train.allow_changed=[settings], for the "
            f"adapter of the last update; or {folder.name} from a backup, and run={run_dir.path} alone",
        )
    return folder


def _allowed(run_dir: RunDir) -> list[str]:
    """Changes allowed beside run=, since the run began."""
    return [name for entry in read_json(run_dir.allowed) for name in entry["names"]] if run_dir.allowed.exists() else []
