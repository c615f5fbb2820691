"""Slurm for real: two nodes, arrays, dependencies, warnings, preemption, a lost node. `-m slurm`.

The two tests that train use the real worker. In the others a stand-in for Python does in a second what stages leave
behind, so that what is tried is Slurm and the scripts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from finetune import sweep
from finetune.compose import load_recipe
from finetune.errors import RunError
from finetune.run import carry_on, start
from finetune.rundir import RunDir, read_json
from finetune.slurm import Queued
from finetune.submit import submit
from tests.job import Stages, ready
from tests.slurm_cluster import Cluster, cluster, left_over, paused, run, until
from tests.trained import ADAPTER, told

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose jobs find this checkout, train on the CPU and leave cores to each other."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as found:
            yield found


@pytest.fixture(autouse=True)
def nothing_runs_on(slurm: Cluster) -> Iterator[None]:
    """After every test: no job in the queue, and no process of one left."""
    yield
    run("scancel", "--user", str(os.getuid()))
    until(lambda: not run("squeue", "--noheader"), 40, "jobs do not end")
    marks = (str(slurm.conf), "SLURM_JOB_ID=")
    until(lambda: not left_over(*marks), 20, lambda: str(left_over(*marks)))


def state(job: str) -> str:
    """Slurm's word for a job's state."""
    return run("scontrol", "show", "job", job, "--oneliner").partition("JobState=")[2].split()[0]


def restarts(job: str) -> int:
    """How often a job was queued again."""
    return int(run("scontrol", "show", "job", job, "--oneliner").partition("Restarts=")[2].split()[0])


def ends(job: str, seconds: float = 60, log: Path | None = None) -> str:
    """The state in which a job ends."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def told_so_far() -> str:
        said = log.read_text() if log and log.exists() else ""
        return f"{run('scontrol', 'show', 'job', job, '--oneliner')}\n{said}"

    return until(lambda: s if (s := state(job)) in final else "", seconds, told_so_far)


# --- stand-ins ------------------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/bash
# python -m finetune.worker train RUN   or   python -m finetune STAGE run=RUN --here
if [ "$2" = finetune.worker ]; then RUN=$4 STAGE=train; else RUN=${{4#run=}} STAGE=$3; fi
[ "$STAGE" != "{real}" ] || exec {python} "$@"
echo "$STAGE rank ${{RANK:-none}} of ${{WORLD_SIZE:-none}} at $MASTER_ADDR on $SLURMD_NODENAME" >> "$RUN/ran"
done_so_far() {{
  case $STAGE in
    train) [ "${{RANK:-0}}" != 0 ] || {{ mkdir -p "$RUN/adapter" && echo '{{}}' > "$RUN/train.json"; }} ;;
    evaluate) echo '{scores}' > "$RUN/scores.json" ;;
    *) touch "$RUN/$STAGE.done" ;;
  esac
}}
{body}
"""
PLAIN = "done_so_far"


@pytest.fixture
def job(tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunDir, list[Queued]]]:
    """Submits a run whose stages are stand-ins: `body` is their shell, the stage `real` runs for real."""

    def make(body: str = PLAIN, until: str = "evaluate", real: str = "", gain: bool = True, **changes: object):  # type: ignore[no-untyped-def]
        settings = {"launch__kind": "slurm", "launch__gpus": False, "launch__nodes": 2, "launch__cpus_per_task": 1}
        run_dir = start(ready(tmp_path, **(settings | changes)))
        scores = json.dumps({"gates": [{"gate": "gain", "value": 0.0, "limit": 0.1, "passed": gain}]})
        program = tmp_path / "python"
        program.write_text(STAND_IN.format(real=real, python=sys.executable, scores=scores, body=body))
        program.chmod(0o755)
        carry_on(run_dir, until="data", launch=Stages())
        monkeypatch.setattr(sys, "executable", str(program))
        return run_dir, submit([run_dir], until, print)

    return make


def test_stages_run_one_after_the_other_and_training_on_every_node(slurm: Cluster, job) -> None:  # type: ignore[no-untyped-def]
    run_dir, jobs = job()
    with pytest.raises(RunError, match=f"SLM-005 .*{jobs[0].job} \\(train, "):
        submit([run_dir], "evaluate", print)
    assert [ends(j.job, log=j.log) for j in jobs] == ["COMPLETED", "COMPLETED"]
    ran = sorted((run_dir.path / "ran").read_text().splitlines())
    assert ran == [
        "evaluate rank none of none at  on n1",
        "train rank 0 of 2 at 127.0.0.1 on n1",
        "train rank 1 of 2 at 127.0.0.1 on n2",
    ]
    assert f"job {jobs[0].job}, start 1: 2 ranks on n[1-2]" in jobs[0].log.read_text()
    assert submit([run_dir], "evaluate", print) == []


def test_a_gate_that_is_not_met_ends_the_stages_behind_it(slurm: Cluster, job) -> None:  # type: ignore[no-untyped-def]
    body = f'done_so_far\n[ "$STAGE" != evaluate ] || exec {sys.executable} "$@"'
    run_dir, jobs = job(body, until="export", gain=False)
    assert [ends(j.job, log=j.log) for j in jobs] == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"]
    assert "EVAL-004 gain is 0.0, demanded 0.1" in jobs[1].log.read_text()
    assert not (run_dir.path / "merge.done").exists()
    assert "ExitCode=4:0" in run("scontrol", "show", "job", jobs[1].job, "--oneliner")


def test_a_rank_that_fails_ends_the_others_and_what_waits(slurm: Cluster, job) -> None:  # type: ignore[no-untyped-def]
    _, jobs = job('[ "$RANK" = 1 ] && exit 7; exec sleep 300')
    assert [ends(j.job, log=j.log) for j in jobs] == ["FAILED", "CANCELLED"]
    assert "training failed with exit code" in jobs[0].log.read_text()


SAVES = """
n=$(cat "$RUN/starts.$RANK" 2>/dev/null); echo $((n + 1)) > "$RUN/starts.$RANK"
if [ "$STAGE" = train ] && [ -z "$n" ]; then
  trap 'sleep 1; [ "$RANK" != 0 ] || echo "USR1 after step 1 of 2" > "$RUN/REQUEUE"; exit 0' USR1 TERM
  while :; do sleep 0.1; done
fi
done_so_far
"""


def test_a_warning_ends_in_a_second_start_and_then_the_later_stages(slurm: Cluster, job) -> None:  # type: ignore[no-untyped-def]
    run_dir, jobs = job(SAVES)
    until(lambda: all((run_dir.path / f"starts.{rank}").exists() for rank in (0, 1)), 30, jobs[0].log.read_text)
    run("scancel", "--batch", "--signal=USR1", jobs[0].job)  # as Slurm does before the time limit
    until(lambda: restarts(jobs[0].job) == 1, 30, jobs[0].log.read_text)
    assert state(jobs[1].job) == "PENDING"
    assert [ends(j.job, log=j.log) for j in jobs] == ["COMPLETED", "COMPLETED"]
    assert [(run_dir.path / f"starts.{rank}").read_text() for rank in (0, 1)] == ["2\n", "2\n"]
    log = jobs[0].log.read_text()
    assert "queued again" in log and f"job {jobs[0].job}, start 2" in log


def test_a_training_that_is_cancelled_stays_so(slurm: Cluster, job) -> None:  # type: ignore[no-untyped-def]
    run_dir, jobs = job(SAVES)
    until(lambda: all((run_dir.path / f"starts.{rank}").exists() for rank in (0, 1)), 30, jobs[0].log.read_text)
    run("scancel", jobs[0].job)
    assert [ends(j.job, log=j.log) for j in jobs] == ["CANCELLED", "CANCELLED"]
    until(lambda: (run_dir.path / "REQUEUE").exists(), 20, "the ranks saved")
    until(lambda: not run("squeue", "--noheader"), 20, "it ends")
    assert restarts(jobs[0].job) == 0 and state(jobs[0].job) == "CANCELLED"


def test_tasks_of_an_array_fail_and_go_on_by_themselves(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"launch__kind": "slurm", "launch__gpus": False, "launch__cpus_per_task": 1}
    recipes = [ready(tmp_path, adapter__rank=rank, **settings) for rank in (4, 8, 16)]
    program = tmp_path / "python"
    body = '[ "$STAGE" != train ] || [ "$(basename "$RUN")" != 0002 ] || exit 9\ndone_so_far'
    program.write_text(STAND_IN.format(real="", python=sys.executable, scores="{}", body=body))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: Stages()(stage, run_dir))
    assert sweep.queue(recipes, "evaluate", Console()) == 0
    said = capsys.readouterr().out
    runs = [RunDir(tmp_path / "runs" / "job" / f"000{n}") for n in (1, 2, 3)]
    jobs = [read_json(run_dir.slurm)["jobs"] for run_dir in runs]
    assert [ends(j["train"]["id"]) for j in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [ends(j["evaluate"]["id"]) for j in jobs] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert [run_dir.scores.exists() for run_dir in runs] == [True, False, True]
    for run_dir, noted in zip(runs, jobs, strict=True):
        assert f"ranks on n1, {run_dir.path}" in (run_dir.path / noted["train"]["log"]).read_text().replace("n2", "n1")
    assert f"python -m finetune table run={tmp_path}/runs/job/array-0001" in said


# --- the real worker ------------------------------------------------------------------------------------------------

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
def uninterrupted(slurm: Cluster, place: Path) -> RunDir:
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
    first = ("finetune.worker", f"SLURM_JOB_ID={queued.job}\0", "\0RANK=0\0")  # where it stands, the other one waits
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
    with paused("finetune.worker", f"SLURM_JOB_ID={number}\0", "SLURM_STEP_ID=0\0"):
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
