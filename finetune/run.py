"""The whole job. Read this first: recipe -> check -> plan -> data -> train -> evaluate -> merge -> export -> report.

Each stage reads the run folder and writes into it (`rundir.py` says which names). None knows another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune import check, events, floors, machine, outside, permits, record, signing
from finetune.callable_module import call_by_name
from finetune.compose import read_recipe, recipe_yaml
from finetune.errors import GateError, RecipeError, RunError
from finetune.launch import launch as launch_here
from finetune.plan import cache_gib, plan, run_folder_gib
from finetune.recipe import Recipe
from finetune.rundir import RunDir, create, read_json, write_json, write_text

STAGES: dict[str, Callable[[RunDir], tuple[Path, ...]]] = {
    "data": lambda run: (run.data / "report.json",),
    "train": lambda run: (run.trained, run.train),
    "evaluate": lambda run: (run.scores,),
    "merge": lambda run: (run.merged,),
    "export": lambda run: (run.export,),
    "report": lambda run: (run.report,),
}
"""Stage -> what it leaves in the run folder. A stage whose paths exist is done and is not repeated."""


def run(
    recipe: Recipe,
    *,
    run_dir: RunDir | None = None,
    until: str = "report",
    launch: Callable[[str, RunDir], None] = launch_here,
) -> RunDir:
    """The finished run folder of a recipe. With `run_dir`, continues that run where it stopped.

    `until` names the last stage to carry out; `launch(stage, run_dir)` carries one out. Raises RecipeError with every
    problem of the recipe before anything is written, WeightsError when the base is not at hand, and what stages raise.
    """
    if recipe.launch.kind == "slurm" and launch is launch_here:
        what, why = "launch.kind=slurm: run() carries a job out here and waits for it", "jobs are queued from the shell"
        raise RunError("SLM-009", what, why, "python -m finetune recipe=NAME launch=slurm, or launch=local")
    if run_dir is None:
        return carry_on(start(recipe, until), until=until, launch=launch)
    if read_recipe(run_dir.recipe) != machine.settled(recipe):
        raise RunError(
            "RUN-006",
            f"{run_dir.path} was started with other settings",
            "a run keeps its settings",
            "a new run, without run=",
        )
    return carry_on(run_dir, until=until, launch=launch)


def start(recipe: Recipe, until: str = "report") -> RunDir:
    """A new run folder with the frozen recipe and its plan. Raises what `refuse` raises, and RunError."""
    recipe = machine.settled(recipe)
    refuse(recipe)
    permit(recipe, None, until)
    figures = plan(recipe)
    need = {"run_gib": run_folder_gib(figures), "cache_gib": cache_gib(figures)}
    if found := machine.place_problems(recipe, **need):
        code, _, sentences = "\n".join(found).partition(" ")
        raise RunError(code, sentences)
    run_dir = create(Path(recipe.runs_dir).expanduser(), recipe.name)
    write_json(run_dir.plan, figures.as_json())
    write_text(run_dir.recipe, recipe_yaml(recipe))  # last: a folder with a recipe is a run
    return run_dir


def carry_on(run_dir: RunDir, *, until: str = "report", launch: Callable[[str, RunDir], None] = launch_here) -> RunDir:
    """Carries out the stages of a run that are not done, up to `until`, and writes the record after the last one."""
    stages, recipe = list(STAGES)[: list(STAGES).index(until) + 1], read_recipe(run_dir.recipe)
    refuse(recipe)
    permit(recipe, run_dir, until)
    for number, stage in enumerate(stages, 1):
        if all(path.exists() for path in STAGES[stage](run_dir)):
            print(f"[{number}/{len(STAGES)}] {stage}: done before", flush=True)
            if stage == "train":
                run_dir.requeue.unlink(missing_ok=True)  # of a signal during its last update
        else:
            print(f"[{number}/{len(STAGES)}] {stage}", flush=True)
            run_dir.reopen()
            if stage == "train":
                before_training(recipe, run_dir, until)
            with outside.noting(run_dir, recipe), events.stage(run_dir, stage):
                launch(stage, run_dir)
        if stage == "evaluate":
            require_gates(run_dir)
    if until == list(STAGES)[-1] and not run_dir.record.exists():
        record.write_record(run_dir)
    if until == list(STAGES)[-1] and recipe.sign and not signing.is_signed(run_dir):
        signing.sign(run_dir, Path(recipe.sign))
    return run_dir


def before_training(recipe: Recipe, run_dir: RunDir, until: str, like: RunDir | None = None) -> None:
    """Notes the hash of every input, once.

    Raises RecipeError when a licence text beside the weights forbids the export.
    `like` is a run whose inputs were hashed just now: those of the same files are not read again.
    """
    if run_dir.inputs.exists():
        return
    from finetune.source import base_folder

    base = base_folder(recipe)
    permit(recipe, run_dir, until, base)
    files = record.input_files(recipe, base)
    if like is not None and like.inputs.exists() and set(read_json(like.inputs)) == {str(path) for path in files}:
        write_json(run_dir.inputs, read_json(like.inputs))
        return
    gib = sum(path.stat().st_size for path in files) / 2**30
    if gib >= 1:  # about a minute per 50 GiB
        print(f"hashing {gib:,.1f} GiB of base and rows, for the record ...", flush=True)
    record.note_inputs(run_dir, recipe, base)


def permit(recipe: Recipe, run_dir: RunDir | None, until: str, base: Path | None = None) -> None:
    """Nothing, or RecipeError with the licence rules that forbid an export, where the job is to make one."""
    if list(STAGES).index(until) >= list(STAGES).index("export"):
        permits.refuse(recipe, base, permits.accepted_in(run_dir) if run_dir else ())


def refuse(recipe: Recipe) -> None:
    """Nothing, or the errors of everything that would stop the job later."""
    if found := [*check.problems(recipe), *floors.unsafe(), *machine.fit_problems(recipe)]:
        raise RecipeError(found)
    if wrong := machine.missing_weights(recipe) or machine.unfit_weights(recipe):
        raise wrong


def require_gates(run_dir: RunDir) -> None:
    """Nothing, or GateError with every gate that the scores do not pass: also when a run is continued later."""
    failed = [gate for gate in read_json(run_dir.scores)["gates"] if not gate["passed"]]
    if failed:
        what = "; ".join(
            f"{gate['gate']} is {gate['value']}, demanded {gate['limit']}"
            + (f" ({gate['why']})" if "why" in gate else "")  # scores of older versions do not say
            for gate in failed
        )
        raise GateError("EVAL-004", what, "the run stops here and exports nothing", f"{run_dir.scores} for the scores")


call_by_name(__name__)  # so that `from finetune import run` may give the module or the function
