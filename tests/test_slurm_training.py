"""Slurm and the real worker: a training that is preempted and loses a node, a job as one batch script. `-m slurm`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.compose import load_recipe
from finetune.run import start
from finetune.rundir import RunDir, read_json
from finetune.slurm import Queued
from finetune.submit import submit
from tests.slurm_cluster import Cluster, ends, paused, restarts, run, until
from tests.trained import ADAPTER, told

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]
ROOT = Path(__file__).resolve().parent.parent

WORDS = ("train.precision=fp32", "train.max_steps=20", "train.save_steps=2", "train.batch_size=2", "adapter=attention")
CLUSTER = ("launch=slurm", "launch.nodes=2", "launch.gpus=false", "launch.cpus_per_task=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def queued_training(place: Path) -> tuple[RunDir, Queued]:
    places = (f"runs_dir={place / 'runs'}", f"cache_dir={place / 'cache'}")
    words = (*WORDS, "adapter.dropout=0.1", *CLUSTER, *places)
    run_dir = start(load_recipe("legal_quickstart", "scale=rehearsal", *words))
    (queued,) = submit([run_dir], "train", print)
    return run_dir, queued


@pytest.fixture(scope="module")
def uninterrupted(slurm_of_module: Cluster, place: Path) -> RunDir:
    """A training of two processes on two nodes that nothing disturbs."""
    run_dir, queued = queued_training(place)
    assert ends(queued.job, 200, queued.log) == "COMPLETED"
    assert read_json(run_dir.train)["processes"] == 2
    assert read_json(run_dir.train)["resumed"] == []
    return run_dir


def saved(run_dir: RunDir, step: int) -> bool:
    """Whether the checkpoint of `step` or a later one is there."""
    return any(int(path.name[5:]) >= step for path in run_dir.checkpoints.glob("step-*"))


def test_a_training_that_lost_its_nodes_to_others_and_then_a_node_ends_as_if_nothing_had_happened(
    slurm: Cluster, place: Path, uninterrupted: RunDir
) -> None:
    run_dir, queued = queued_training(place)
    first = (
        "finetune.worker",
        str(slurm.conf),
        f"SLURM_JOB_ID={queued.job}\0",
        "\0RANK=0\0",
    )  # where it stands, the other one waits
    until(lambda: saved(run_dir, 2), 120, queued.log.read_text)
    with paused(*first):
        urgent = run(
            "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=true"
        ).strip()
        until(lambda: "Slurm warns" in queued.log.read_text(), 60, queued.log.read_text)
    assert ends(urgent, 60, queued.log) == "COMPLETED"
    until(lambda: restarts(queued.job) >= 1, 30, queued.log.read_text)
    stopped_at = max(int(path.name[5:]) for path in run_dir.checkpoints.glob("step-*"))
    assert 2 <= stopped_at < 16

    until(lambda: saved(run_dir, stopped_at + 2), 120, queued.log.read_text)
    before = restarts(queued.job)
    with paused(*first):
        slurm.kill_node("n2")
    until(lambda: restarts(queued.job) > before, 60, queued.log.read_text)
    slurm.resume_node("n2")

    assert ends(queued.job, 120, queued.log) == "COMPLETED"
    written = read_json(run_dir.train)
    assert len(written["resumed"]) >= 2
    assert told(run_dir) == told(uninterrupted)
    assert (run_dir.adapter / ADAPTER).read_bytes() == (uninterrupted.adapter / ADAPTER).read_bytes()
    assert not run_dir.requeue.exists()


def test_one_batch_script_does_a_whole_job_and_makes_its_run_once(
    slurm: Cluster, place: Path, uninterrupted: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    words = ["recipe=legal_quickstart", "scale=rehearsal", "train.precision=fp32", f"cache_dir={place / 'cache'}"]
    words += ["train.max_steps=20", "train.save_steps=2", "evaluate.min_gain=1.0"]
    script, resources = str(ROOT / "scripts" / "slurm" / "train.sbatch"), ("--nodes=1", "--cpus-per-task=1")
    done = subprocess.run(
        ["sbatch", "--parsable", *resources, script, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    log, runs = tmp_path / f"finetune-{number}.log", tmp_path / "runs" / "legal_quickstart"
    until(lambda: saved(RunDir(runs / "0001"), 2), 120, lambda: log.read_text() if log.exists() else "no log")
    with paused("finetune.worker", str(slurm.conf), f"SLURM_JOB_ID={number}\0", "SLURM_STEP_ID=0\0"):
        run("scancel", "--batch", "--signal=USR1", number)
        until(lambda: "Slurm warns" in log.read_text(), 60, log.read_text)
    assert ends(number, 200, log) == "FAILED", log.read_text()  # the gate is not met
    assert "EVAL-004" in log.read_text()
    assert restarts(number) == 1
    assert [path.name for path in runs.iterdir()] == ["0001"]
    run_dir = RunDir(runs / "0001")
    assert read_json(run_dir.train)["processes"] == 1
    assert read_json(run_dir.train)["resumed"][0]["after_step"] >= 2
    assert run_dir.scores.exists() and not run_dir.merged.exists()
