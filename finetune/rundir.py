"""One run on disk: the only module that knows the names in a run folder.

Everything is written under a temporary name, fsynced and renamed, so that existence means done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import RunError

TEMPORARY = ".partial-"
"""Prefix of everything that is not finished; `RunDir.sweep` removes such leftovers of a killed run."""

RESUMED = ".merging-"
"""Prefix of a folder that is not finished and that the same command goes on with after it was killed."""


SIGNATURE = "model.sig"
"""Name of the signature in export/, as model-signing calls it."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run folder, `runs/<recipe>/<number>`; attributes are the paths in it."""

    path: Path
    """The folder itself."""

    @property
    def recipe(self) -> Path:
        """The resolved recipe, written by the parent process; stages read only this. Allowed changes write it anew."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """What was expected: memory, steps, tokens, hours, money."""
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        """Prepared splits, ledger.jsonl, report.json and mask.txt."""
        return self.path / "data"

    @property
    def rejected(self) -> Path:
        """Ledger and report of rows that ended the data stage."""
        return self.path / "data_rejected"

    @property
    def checkpoints(self) -> Path:
        """Training states, one folder each, and LATEST."""
        return self.path / "checkpoints"

    @property
    def requeue(self) -> Path:
        """Its existence means: training stopped early on request, start it again."""
        return self.path / "REQUEUE"

    @property
    def job(self) -> Path:
        """Batch script of the training, as it was submitted to Slurm."""
        return self.path / "job.sbatch"

    @property
    def later(self) -> Path:
        """Batch script of a later stage."""
        return self.path / "later.sbatch"

    @property
    def slurm(self) -> Path:
        """Which Slurm jobs were submitted for this run, and their logs."""
        return self.path / "slurm.json"

    @property
    def allowed(self) -> Path:
        """Changes that the user has allowed since the run began, by name and date."""
        return self.path / "allowed.json"

    @property
    def events(self) -> Path:
        """What happened to the run, a line each, chained by hashes."""
        return self.path / "events.jsonl"

    @property
    def inputs(self) -> Path:
        """Hashes of every input file, taken before training began."""
        return self.path / "inputs.json"

    @property
    def logs(self) -> Path:
        """What trackers write: TensorBoard event files, and a folder each for others."""
        return self.path / "logs"

    @property
    def directions(self) -> Path:
        """What the adapter began with, where that came from the training rows (EVA)."""
        return self.path / "directions.safetensors"

    @property
    def adapter(self) -> Path:
        """The finished PEFT adapter; its existence means: trained."""
        return self.path / "adapter"

    @property
    def tuned(self) -> Path:
        """What full fine-tuning leaves instead of an adapter: the base's own weights that were trained."""
        return self.path / "tuned"

    @property
    def trained(self) -> Path:
        """The adapter, or what stands in its place; its existence means: trained."""
        return self.tuned if self.tuned.exists() else self.adapter

    @property
    def train(self) -> Path:
        """Losses, tokens, seconds, peak memory, coverage table, versions."""
        return self.path / "train.json"

    @property
    def batches(self) -> Path:
        """The digest of every update's batch, a line each, while it trains and after."""
        return self.path / "batches.jsonl"

    @property
    def loss_plot(self) -> Path:
        """Loss, gradient norm and learning rate of the training, as a picture."""
        return self.path / "loss.png"

    @property
    def scores(self) -> Path:
        """Base and tuned, side by side, with the gates' verdicts."""
        return self.path / "scores.json"

    @property
    def scores_rows(self) -> Path:
        """The same of each held-out row, a line each: hashes and figures, no words. Written before `scores`."""
        return self.path / "scores_rows.jsonl"

    @property
    def scoring(self) -> Path:
        """Parts of an evaluation that are done, until all are: one that failed goes on with them."""
        return self.path / ".scoring"

    @property
    def merged(self) -> Path:
        """Weights with the adapter added, in the original checkpoint's key layout."""
        return self.path / "merged"

    @property
    def parity(self) -> Path:
        """The proof that the merged weights answer as the adapter does."""
        return self.merged / "parity.json"

    @property
    def answers(self) -> Path:
        """Answers of base and tuned to held-out prompts, token by token: what exports and servers are compared with."""
        return self.merged / "answers.json"

    @property
    def export(self) -> Path:
        """What a server loads."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """One page a person opens."""
        return self.path / "report.html"

    @property
    def record(self) -> Path:
        """The record: hashes of every input and output, licences, versions."""
        return self.path / "run.json"

    @property
    def signature(self) -> Path:
        """Signature of the record; that of the export is `SIGNATURE` in it."""
        return self.path / "run.json.sig"

    def reopen(self) -> None:
        """Removes the record and the signatures: they will not describe the folder any longer."""
        for path in (self.record, self.signature, self.export / SIGNATURE):
            path.unlink(missing_ok=True)

    def require(self, path: Path, stage: str) -> Path:
        """`path` if it exists; otherwise an error that says which stage makes it."""
        if not path.exists():
            raise RunError(
                "RUN-002",
                f"{path} is missing",
                f"the {stage} stage has not finished in this run",
                f"python -m finetune {stage} run={self.path}",
            )
        return path

    def sweep(self) -> None:
        """Removes unfinished files and folders that a killed run left behind. Call it with the lock held."""
        for left in [*self.path.glob(TEMPORARY + "*"), *self.path.glob("*/" + TEMPORARY + "*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self.scores.exists():
            shutil.rmtree(self.scoring, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; a second process gets RUN-003. The lock ends with the process."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    "RUN-003",
                    f"{self.path} is in use",
                    "another process works on this run",
                    "wait for it, or start a new run without run=",
                ) from None
            yield
        finally:
            os.close(handle)


def create(runs_dir: Path, name: str) -> RunDir:
    """A new run folder `runs_dir/name/<next number>`. Raises RunError when the place cannot be written."""
    parent = runs_dir / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
        while True:  # another process may take a number between listing and making
            path = parent / f"{number:04d}"
            try:
                path.mkdir()
                return RunDir(path)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise RunError(
            "RUN-001",
            f"cannot make a run folder in {parent}",
            error.strerror or str(error),
            "runs_dir=/a/writable/folder",
        ) from None


def open_run(path: str | Path) -> RunDir:
    """The existing run folder at `path`. Raises RunError when it is not one."""
    run_dir = RunDir(Path(path))
    if not run_dir.recipe.is_file():
        found = sorted(str(p.parent) for p in Path("runs").glob("*/*/recipe.yaml"))[-5:]
        exists = "known runs: " + ", ".join(found) if found else "there are no runs under runs/ yet"
        what = f"run={path} is not a run folder"
        raise RunError("RUN-004", what, f"it has no recipe.yaml; {exists}", "run=runs/NAME/0001")
    return run_dir


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    An existing `target` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, target: Path) -> None:
    """Gives a finished folder its name, in place of an older one, once the disk holds every file of it."""
    for path in sorted(partial.rglob("*")):
        fsync(path)
    fsync(partial)
    if target.exists():
        old = target.with_name(f"{TEMPORARY}{target.name}-old-{uuid.uuid4().hex[:8]}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    fsync(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends without an error, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        fsync(partial)
        partial.rename(target)
        fsync(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Writes `text` to `target` in one step: readers see the old file or the new one."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def append(target: Path, line: str) -> None:
    """Adds a line to `target`. The disk holds it when this returns."""
    with target.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `target` in one step. NaN and infinity are refused (ValueError)."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises ValueError where it is none, also where it is nested too deeply to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tree(folder: Path) -> dict[str, str]:
    """Relative path -> hex sha256 of every finished file below `folder`, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(TEMPORARY))
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


def fsync(path: Path) -> None:
    """Makes the disk hold what a file or folder holds. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
