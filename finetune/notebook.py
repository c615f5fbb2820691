"""Runs and sweeps as values for a notebook: `open_run`, `run_sweep`, `open_sweep`, `compare`.

`job = open_run("runs/NAME/0001")`, then `job.scores`, `job.losses` ... are what the run folder has, as tables that a
notebook shows; a stage that has not run yet is an error that says so. Nothing is kept in memory between two looks.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import RunError
from finetune.plan import Plan
from finetune.recipe import Recipe
from finetune.run import STAGES
from finetune.rundir import RunDir, read_json
from finetune.rundir import open_run as open_folder
from finetune.sweep_folder import Sweep
from finetune.views import Cell, Losses, Panel, Scores, Table


def open_run(place: str | Path | RunDir | OpenedRun) -> OpenedRun:
    """A run to look at and to go on with: a path such as runs/NAME/0001, or what `run(recipe)` has given.

    Raises RunError (RUN-004) when it is no run folder.
    """
    path = place if isinstance(place, str | Path) else place.path
    return OpenedRun(open_folder(path))


def run_sweep(name: str, *words: str, until: str = "evaluate", config_dir: str | None = None) -> OpenedSweep:
    """Every job of a recipe with `key=a,b,c` words, carried out up to `until`, each in a process of its own.

    Raises RecipeError with the problems of all jobs before the first starts, RunError where they are to be queued. A
    job that fails stays in the table with its exit code.
    """
    from finetune import sweep

    given = [f"recipe={name}", *words]
    variants, recipes = sweep.composed(given, config_dir)
    if recipes[0].launch.kind == "slurm":
        raise RunError("SLM-009", "launch.kind=slurm: a notebook would wait for it", "", "the shell, or launch=local")
    return _carried_out(sweep.begin(given, until, variants, recipes))


def open_sweep(path: str | Path) -> OpenedSweep:
    """The sweep in a folder such as runs/NAME/sweep-0001. Raises RunError (SWP-002) when it is none."""
    from finetune.sweep_folder import read_sweep

    return OpenedSweep(read_sweep(Path(path)))


def compare(*runs: str | Path | RunDir | OpenedRun) -> Table:
    """Runs side by side: the settings in which they differ, what they learnt, and what it took.

    Their tuned models are tested against the first run's, row by row on the same held-out rows; p-values are corrected
    over the runs by Holm's method. The sentences below the table say what is shown, or why nothing was tested.
    """
    from finetune.keys import flatten, settings

    opened = [open_run(place) for place in runs]
    known = settings(Recipe)
    flat = [dict(flatten(asdict(job.recipe), known)) for job in opened]
    differ = [key for key in known if any(tree[key] != flat[0][key] for tree in flat)]
    lines: list[tuple[Cell, ...]] = [(key, *(str(tree[key]) for tree in flat)) for key in differ]
    scores = [read_json(job.files.scores) if job.files.scores.is_file() else None for job in opened]
    trained = [read_json(job.files.train) if job.files.train.is_file() else None for job in opened]
    for side in ("base", "tuned"):
        lines.append((f"held-out loss, {side}", *(s[side]["loss"] if s else None for s in scores)))
        lines.append((f"right answers, {side}", *(s[side]["accuracy"] if s else None for s in scores)))
    parameters = (sum(row["trainable"] for row in t["coverage"]) if t else None for t in trained)
    lines.append(("trained parameters", *parameters))
    lines.append(("training, seconds", *(t["seconds"] if t else None for t in trained)))
    lines.append(("highest memory, GiB", *(t["peak_memory_gib"] if t else None for t in trained)))
    names = [f"{job.path.parent.name}/{job.path.name}" for job in opened]
    tests, note = _tested(opened, names) if len(opened) > 1 else ([], "")
    return Table("", ("", *names), (*lines, *tests), note=note)


def _tested(opened: list[OpenedRun], names: list[str]) -> tuple[list[tuple[Cell, ...]], str]:
    """Lines of the tests against the first run, and what they say together."""
    from finetune.pairwise import against_first

    if unscored := [name for job, name in zip(opened, names, strict=True) if not job.files.scores.is_file()]:
        return [], f"Not tested against each other: {', '.join(unscored)} has no scores yet."
    tested = against_first([job.files for job in opened])
    lines: list[tuple[Cell, ...]] = []
    for measure in dict.fromkeys(d.measure for each in tested for d in each.differences):
        found = [next((d for d in each.differences if d.measure == measure), None) for each in tested]
        lines.append((f"{measure}: change", None, *(d.change if d else None for d in found)))
        if any(d and d.low is not None for d in found):
            lines.append((f"{measure}: from", None, *(d.low if d else None for d in found)))
            lines.append((f"{measure}: to", None, *(d.high if d else None for d in found)))
        lines.append((f"{measure}: p", None, *(d.adjusted if d else None for d in found)))
    said = [each.sentence(name, names[0]) for each, name in zip(tested, names[1:], strict=True)]
    return lines, " ".join(said)


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """One run. Its attributes read the run folder anew each time."""

    files: RunDir
    """The run folder; its attributes are paths."""

    @property
    def path(self) -> Path:
        """The run folder's own path."""
        return self.files.path

    @property
    def recipe(self) -> Recipe:
        """The frozen settings."""
        from finetune.compose import read_recipe

        return read_recipe(self.files.recipe)

    @property
    def done(self) -> tuple[str, ...]:
        """The stages that are finished, in their order."""
        return tuple(stage for stage, left in STAGES.items() if all(path.exists() for path in left(self.files)))

    @property
    def plan(self) -> Plan:
        """What was expected when the run began."""
        from finetune.plan import read_plan

        return read_plan(self.files.plan)

    @property
    def rows(self) -> Table:
        """How many rows are on which side, and why others were dropped."""
        self.files.require(self.files.data / "report.json", "data")
        counted: Counter[str] = Counter()
        with (self.files.data / "ledger.jsonl").open(encoding="utf-8") as lines:
            for entry in map(json.loads, lines):
                counted[entry["split"] or f"dropped: {entry['code']}"] += 1
        return Table("rows", ("where", "rows"), tuple(counted.most_common()))

    @property
    def losses(self) -> Losses:
        """The training loss of every update, with its plot."""
        plot = self.files.loss_plot
        return Losses(tuple(self._train()["steps"]), plot if plot.is_file() else None)

    @property
    def coverage(self) -> Table:
        """What the adapter is on, group by group, and how the base is really stored."""
        from finetune.report.tables import coverage_rows, storage_sentence

        told = coverage_rows(self._train()["coverage"])
        columns = ("weights", "parameters", "share", "stored", "GiB", "adapted", "trained")
        keys = ("name", "parameters", "share", "stored", "gib", "adapted", "trainable")
        rows = tuple(tuple(row[key] for key in keys) for row in told)
        return Table("what is trained", columns, rows, {"share": ".1%"}, storage_sentence(told))

    @property
    def scores(self) -> Scores:
        """Base against tuned."""
        return Scores(read_json(self.files.require(self.files.scores, "evaluate")))

    @property
    def samples(self) -> Table:
        """Held-out questions with the answers of base and tuned, and the expected ones."""
        columns = ("question", "base", "tuned", "expected")
        rows = tuple(tuple(sample[key] for key in columns) for sample in self.scores.values["samples"])
        return Table("held-out samples", columns, rows)

    @property
    def exported(self) -> Table:
        """Every exported file and its size in bytes."""
        folder = self.files.require(self.files.export, "export")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        rows = tuple((str(path.relative_to(folder)), path.stat().st_size) for path in files)
        return Table(f"{folder}", ("file", "bytes"), rows)

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return self.files.require(self.files.report, "report")

    def carry_on(self, until: str = "report") -> OpenedRun:
        """This run after the stages that were not done, up to `until`. Raises what stages raise."""
        from finetune.run import carry_on

        carry_on(self.files, until=until)
        return self

    def ask(self, *questions: str, max_new_tokens: int = 48) -> Table:
        """Each question with the answers of base and tuned, word by word the likeliest. Loads the model each time."""
        from finetune.chat import answers

        return Table("", ("question", "base", "tuned"), tuple(answers(self.files, questions, max_new_tokens)))

    def verify(self, public_key: Path | None = None) -> int:
        """How many files are as the record says. Raises RunError (VER-001) naming all that is not."""
        from finetune.verify import verify

        return verify(self.files, public_key)

    def __repr__(self) -> str:
        left = [stage for stage in STAGES if stage not in self.done]
        return f"{self.path}: " + (f"still to do: {', '.join(left)}" if left else "all stages are done")

    def _train(self) -> Any:
        return read_json(self.files.require(self.files.train, "train"))


@dataclass(frozen=True, slots=True, repr=False)
class OpenedSweep:
    """Several jobs and their scores, the lowest tuned loss first."""

    sweep: Sweep
    """The sweep as its folder has it."""

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.sweep.path

    @property
    def runs(self) -> tuple[OpenedRun, ...]:
        """A run per job, in the order in which they were carried out."""
        return tuple(OpenedRun(job.run_dir) for job in self.sweep.jobs)

    @property
    def best(self) -> OpenedRun:
        """The run with the lowest tuned loss. Raises RunError when no job has scores."""
        scored = [job for job in self.sweep.jobs if job.run_dir.scores.is_file()]
        if not scored:
            how = "carry_on(), and look at the exit codes"
            raise RunError("SWP-004", f"no job of {self.path} has scores", "none has finished evaluate", how)
        return OpenedRun(min(scored, key=lambda job: job.tuned_loss()).run_dir)

    @property
    def table(self) -> Table:
        """A line per job: settings, losses, right answers, exit code, run."""
        rows: list[tuple[Cell, ...]] = []
        for job in sorted(self.sweep.jobs, key=lambda job: job.tuned_loss()):
            scored = job.run_dir.scores.is_file()
            losses = (job.tuned_loss(), job.base_loss()) if scored else (None, None)
            rows.append((" ".join(job.words), *losses, job.accuracy(), job.exit_code, str(job.run_dir.path)))
        columns = ("job", "tuned loss", "base loss", "tuned right", "exit code", "run")
        forms = {"tuned loss": ".4f", "base loss": ".4f", "tuned right": ".1%"}
        return Table(str(self.path), columns, tuple(rows), forms)

    def as_rows(self) -> list[dict[str, Cell]]:
        """A dict per job."""
        return self.table.as_rows()

    def carry_on(self) -> OpenedSweep:
        """The sweep after the jobs that were not finished or failed have run once more."""
        return _carried_out(self.sweep)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return Panel(tables=(self.table,), picture=self.sweep.picture)._repr_html_()


def _carried_out(found: Sweep) -> OpenedSweep:
    from rich.console import Console

    from finetune import sweep

    return OpenedSweep(sweep.carry_out_jobs(found, Console(), sweep.process))
