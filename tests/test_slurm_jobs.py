"""Slurm for real: two nodes, arrays, dependencies, warnings, cancellation. `-m slurm`.

A stand-in for Python does in a second what stages leave behind, so that what is tried is Slurm and the scripts.
The real worker is in test_slurm_training.py, with a cluster of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from finetune import sweep
from finetune.errors import RunError
from finetune.run import carry_on, start
from finetune.rundir import RunDir, read_json
from finetune.slurm import Queued
from finetune.submit import submit
from tests.job import Stages, ready
from tests.slurm_cluster import Cluster, ends, restarts, run, state, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]

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
    run_dir, jobs = job(f'[ "$STAGE" != train ] || until [ -e "$RUN/go" ]; do sleep 0.1; done\n{PLAIN}')
    with pytest.raises(RunError, match=f"SLM-005 .*{jobs[0].job} \\(train, "):
        submit([run_dir], "evaluate", print)
    (run_dir.path / "go").touch()
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
