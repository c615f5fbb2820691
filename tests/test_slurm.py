"""Slurm without a cluster: what may be set, what the scripts say and do, what is refused before there is a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from finetune import check, slurm, sweep, sweep_table
from finetune.__main__ import main, read
from finetune.commands import _keep, _kept
from finetune.errors import GateError, RecipeError, RunError
from finetune.machine import settled
from finetune.recipe import Launch, Recipe
from finetune.run import STAGES, carry_on, run, start
from finetune.rundir import RunDir, read_json, write_json
from finetune.sbatch import seconds
from finetune.slurm.script import HERE, Place, later_script, train_script
from finetune.submit import link_folder, ready, submit
from tests.fake_slurm import FakeSlurm
from tests.job import Stages
from tests.job import ready as ready_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def queued_recipe(tmp_path: Path, **changes: object) -> Recipe:
    return ready_recipe(tmp_path, **({"launch__kind": "slurm", "launch__gpus": False} | changes))


# --- settings -------------------------------------------------------------------------------------------------------

FINE = {
    "partition": ["main", "gpu,long", "a100-80.x"],
    "account": ["team_7", "me@site"],
    "qos": ["high"],
    "constraint": ["a100&ib", "[rack1|rack2]", "intel*2"],
    "time": ["30", "90:00", "04:00:00", "2-0", "2-00:30:00"],
    "memory": ["0", "200G"],
    "sbatch": [["--exclusive"], ["--mail-type=END,FAIL", "--mail-user=me@site.org"], ["--gres=shard:2"]],
    "setup": [
        ["module load cuda/12.4 gcc"],
        ["source ${HOME}/env.sh"],
        ["export NCCL_DEBUG=INFO", "ulimit -l unlimited"],
    ],
}


def test_what_sites_ask_for_can_be_set(tmp_path: Path) -> None:
    for name, values in FINE.items():
        for value in values:
            assert check.problems(queued_recipe(tmp_path, **{f"launch__{name}": value})) == []


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint", "time", "memory"])
@pytest.mark.parametrize(
    "value", ["a\n#SBATCH --wrap=reboot", "a\n", "a b", "a;reboot", "$(reboot)", "`reboot`", "a'b", 'a"b', "#a"]
)
def test_a_setting_cannot_begin_a_line_of_its_own_in_the_script(tmp_path: Path, name: str, value: str) -> None:
    value = value.replace("a", "30") if name in ("time", "memory") else value
    found = check.problems(queued_recipe(tmp_path, **{f"launch__{name}": value}))
    assert [p[:7] for p in found] == ["SLM-012"]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--exclusive\n#SBATCH --wrap=reboot", "no single long option"),
        ("--comment=a b", "no single long option"),
        ("--comment=`reboot`", "no single long option"),
        ("-N4", "no single long option"),
        ("--array=0-9", "--array is set by the program"),
        ("--no-requeue", "--no-requeue is set by the program"),
        ("--wrap=reboot", "--wrap is set by the program"),
        ("--time=1", "Use launch.time"),
        ("--gpus-per-node=8", "Use launch.devices"),
    ],
)
def test_an_option_that_would_change_what_a_job_is_is_refused(tmp_path: Path, option: str, says: str) -> None:
    (found,) = check.problems(queued_recipe(tmp_path, launch__sbatch=[option]))
    assert found.startswith("SLM-013") and says in found and "\n" not in found


@pytest.mark.parametrize(
    "line",
    [
        *("module load cuda; reboot", "module load a && reboot", "source x | sh", "module load $(reboot)", "curl x"),
        *("source `reboot`", "export A=1\nreboot", "source x > /etc/passwd", "", "reboot", "source 'x'"),
    ],
)
def test_set_up_is_plain_commands_that_prepare_an_environment(tmp_path: Path, line: str) -> None:
    (found,) = check.problems(queued_recipe(tmp_path, launch__setup=[line]))
    assert found.startswith("SLM-014") and "\n" not in found


@pytest.mark.parametrize("folder", ["runs", "../runs", "/a b", "/a\n#SBATCH", "/a%j", "/$HOME", "/a;b"])
def test_runs_lie_in_a_folder_that_other_machines_can_name(tmp_path: Path, folder: str) -> None:
    (found,) = check.problems(queued_recipe(tmp_path, runs_dir=folder))
    assert found.startswith("SLM-011")


def test_a_time_limit_leaves_time_to_train(tmp_path: Path) -> None:
    assert [seconds(t) for t in ("3", "3:30", "1:0:0", "2-0", "1-2:30", "1-2:30:10")] == [
        *(180, 210, 3600, 172800, 95400, 95410)
    ]
    (found,) = check.problems(queued_recipe(tmp_path, launch__time="00:03:00"))
    assert found.startswith("SLM-016 launch.time=00:03:00 is 180 s")


def test_a_base_is_not_split_among_cpus(tmp_path: Path) -> None:
    (found,) = check.problems(queued_recipe(tmp_path, launch__distribution="fsdp2", launch__nodes=2))
    assert found.startswith("SLM-017")
    assert check.problems(queued_recipe(tmp_path, launch__distribution="fsdp2", launch__gpus=True)) == []


def test_a_setting_for_slurm_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    for name, value in (("partition", "main"), ("gpus", False), ("setup", ["module load x"]), ("time", "1:0:0")):
        (found,) = check.problems(ready_recipe(tmp_path, **{f"launch__{name}": value}))
        assert found.startswith(f"SLM-015 launch.{name} has no effect")


def test_arithmetic_is_that_of_the_gpus_and_not_of_the_machine_that_submits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.machine.multiplies_bf16", lambda: False)
    auto = queued_recipe(tmp_path, train__precision="auto")
    assert settled(auto).train.precision == "fp32"
    auto.launch.gpus = True
    assert settled(auto).train.precision == "bf16"


# --- the scripts ----------------------------------------------------------------------------------------------------


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def place(run: Path = Path("/shared/runs/x/0001"), tasks: int = 0) -> Place:
    return Place(name="x", python="/opt/my python", run=run, tasks=tasks)


def test_the_training_asks_for_every_node_rank_and_gpu_and_for_a_warning() -> None:
    launch = Launch(kind="slurm", nodes=2, devices=8, time="4:0:0", warn_seconds=300, memory="1T", cpus_per_task=6)
    launch.sbatch = ["--exclusive"]
    asked = directives(train_script(place(), launch))
    assert asked == [
        *("--job-name=x", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR1@300"),
        *("--time=4:0:0", "--cpus-per-task=6", "--mem=1T", "--exclusive"),
        *("--requeue", "--open-mode=append", "--output=/shared/runs/x/0001/train-%j.log"),
    ]


def test_a_later_stage_asks_for_one_task_and_one_gpu() -> None:
    launch = Launch(kind="slurm", nodes=2, devices=8, partition="gpu")
    asked = directives(later_script(place(), launch))
    assert {"--nodes=1", "--ntasks=1", "--gpus-per-node=1", "--partition=gpu"} <= set(asked)
    assert not any(option.startswith("--signal") for option in asked)  # it has nothing to save
    launch.gpus = False
    assert not [o for make in (train_script, later_script) for o in directives(make(place(), launch)) if "gpu" in o[:9]]


def test_what_the_recipe_leaves_open_is_left_to_the_site() -> None:
    asked = directives(train_script(place(), Launch(kind="slurm")))
    for option in ("partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task"):
        assert not any(line.startswith(f"--{option}") for line in asked)


def test_scripts_are_bash_and_quote_what_they_hold(tmp_path: Path) -> None:
    launch = Launch(kind="slurm", setup=["export A=1 B=${HOME}", "source ./nothing.sh"])
    for make in (train_script, later_script):
        for where in (place(), place(tasks=3)):
            script = make(where, launch)
            assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
            head = script.partition("\n# ")[0]
            assert "PYTHON='/opt/my python'" in head
            done = subprocess.run(["bash"], input=head, text=True, capture_output=True, cwd=tmp_path)
            assert done.returncode == 3 and "launch.setup failed: source ./nothing.sh" in done.stdout
    batch = ROOT / "scripts" / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(batch)]).returncode == 0


def test_a_task_of_an_array_finds_its_own_run(tmp_path: Path) -> None:
    runs = [tmp_path / "runs" / "x" / f"000{n}" for n in (3, 7)]
    for path in runs:
        path.mkdir(parents=True)
    links = link_folder([RunDir(path) for path in runs])
    assert link_folder([RunDir(path) for path in runs]) != links
    script = train_script(place(links, tasks=2), Launch(kind="slurm", gpus=False))
    assert "--array=0-1" in directives(script)
    assert f"--output={links}/%a/train-%A.log" in directives(script)
    head = script.partition("\n# ")[0] + "\necho $RUN"
    for task, path in enumerate(runs):
        done = subprocess.run(
            ["bash"], input=head, text=True, capture_output=True, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
        )
        assert done.stdout.strip() == str(path)


def test_the_script_knows_by_which_files_training_is_done() -> None:
    text = (HERE / "train.sh").read_text()
    run_dir = RunDir(Path("/run"))
    for path in (*STAGES["train"](run_dir), run_dir.tuned):
        assert f'-e "$RUN/{path.name}"' in text


# --- what a training job does, with stand-ins for srun and scontrol ---------------------------------------------------

RANK = """#!/bin/bash
echo "rank ${RANK:-none} of ${WORLD_SIZE:-none} local ${LOCAL_RANK:-none}/${LOCAL_WORLD_SIZE:-none}" \
  "at $MASTER_ADDR:$MASTER_PORT: $*" >> RUN/ranks
{body}
"""


def begin(tmp_path: Path, body: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """The training's script under bash, with a stand-in for Python whose ranks do `body`."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    python = tmp_path / "python"
    python.write_text(RANK.replace("RUN", str(run)).replace("{body}", body.replace("RUN/", f"{run}/")))
    python.write_text(python.read_text().replace(f"${{{run}", "${RUN"))
    python.chmod(0o755)
    where = Place(name="x", python=str(python), run=run)
    script = tmp_path / "job.sbatch"
    script.write_text(train_script(where, Launch(kind="slurm", gpus=False)))
    slurm_says = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    return subprocess.Popen(
        ["bash", str(script), *words],
        env=os.environ | slurm_says | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = job.communicate(timeout=30)
    return job.returncode, said


def test_every_rank_is_told_its_place(tmp_path: Path, fake: FakeSlurm) -> None:
    code, said = finish(begin(tmp_path, "exit 0"))
    assert code == 0, said
    ranks = sorted((tmp_path / "run" / "ranks").read_text().splitlines())
    assert ranks == [
        f"rank {n} of 2 local {n}/2 at 10.0.0.7:20410: -m finetune.worker train {tmp_path}/run" for n in (0, 1)
    ]
    (call,) = fake.calls("srun")
    assert "--kill-on-bad-exit=1" in call and "--mpi=none" in call
    assert fake.calls("scontrol requeue") == []


def test_a_single_rank_is_no_distributed_training(tmp_path: Path, fake: FakeSlurm) -> None:
    assert finish(begin(tmp_path, "exit 0", RANKS="1", SLURM_NTASKS="1"))[0] == 0
    assert (tmp_path / "run" / "ranks").read_text().startswith("rank none of none local none/none at")


def test_a_failure_of_a_rank_is_the_failure_of_the_job(tmp_path: Path, fake: FakeSlurm) -> None:
    code, said = finish(begin(tmp_path, "touch RUN/REQUEUE; exit 7"))
    assert code == 7 and "training failed with exit code 7" in said
    assert fake.calls("scontrol requeue") == []


def test_a_warning_reaches_the_ranks_and_the_job_is_queued_again(tmp_path: Path, fake: FakeSlurm) -> None:
    body = (
        'trap "echo USR1 after step 3 of 9 > RUN/REQUEUE; exit 0" USR1; touch RUN/up.$RANK; while :; do sleep 0.1; done'
    )
    job = begin(tmp_path, body)
    end = time.monotonic() + 20
    while not all((tmp_path / "run" / f"up.{n}").exists() for n in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    code, said = finish(job)
    assert "Slurm warns" in said and "USR1 after step 3 of 9; queued again" in said
    assert fake.calls("scontrol requeue") == ["scontrol requeue 41"]
    assert code == -signal.SIGTERM  # by Slurm, here by the stand-in


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", ""])
def test_what_somebody_cancelled_or_slurm_itself_queues_again_is_not_queued_again(
    tmp_path: Path, fake: FakeSlurm, state: str
) -> None:
    fake.answer("state", state)
    code, said = finish(begin(tmp_path, "touch RUN/REQUEUE; exit 0"))
    assert code == 1 and f"Slurm says {state}" in said
    assert fake.calls("scontrol requeue") == []


def test_an_old_request_to_requeue_does_not_count(tmp_path: Path, fake: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "REQUEUE").touch()
    assert finish(begin(tmp_path, "exit 0"))[0] == 0
    assert fake.calls("scontrol requeue") == []


def test_a_warning_during_the_last_update_queues_the_job_again_only_for_the_stages_in_it(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    body = "mkdir -p RUN/tuned; touch RUN/train.json; echo USR1 after step 9 of 9 > RUN/REQUEUE; exit 0"
    assert finish(begin(tmp_path, body))[0] == 0
    assert fake.calls("scontrol requeue") == [] and not (tmp_path / "run" / "REQUEUE").exists()
    (tmp_path / "run" / "train.json").unlink()
    _, said = finish(begin(tmp_path, body, "report"))
    assert "USR1 after step 9 of 9; queued again" in said
    assert fake.calls("scontrol requeue") == ["scontrol requeue 41"]


@pytest.mark.parametrize("left", ["adapter", "tuned"])
def test_a_finished_training_is_not_repeated_and_later_stages_follow_when_asked(
    tmp_path: Path, fake: FakeSlurm, left: str
) -> None:
    (tmp_path / "run" / left).mkdir(parents=True)
    (tmp_path / "run" / "train.json").touch()
    code, said = finish(begin(tmp_path, "exit 4", "report"))
    assert code == 4 and "train: done before" in said
    assert fake.calls("srun") == []
    assert (tmp_path / "run" / "ranks").read_text().endswith(f"-m finetune report run={tmp_path}/run --here\n")


# --- before anything is queued --------------------------------------------------------------------------------------


def test_a_recipe_that_slurm_takes_passes(tmp_path: Path, fake: FakeSlurm) -> None:
    said: list[str] = []
    ready([queued_recipe(tmp_path, launch__nodes=4, launch__partition="main,urgent")], said.append)
    assert said == [] and fake.calls("sbatch") == []
    assert "#SBATCH --ntasks=1" in (fake.folder / "tested").read_text()  # the later stages were asked about, too


@pytest.mark.parametrize(
    ("changes", "answers", "says"),
    [
        ({"launch__partition": "gpus"}, {}, "SLM-002 .*no partition gpus: there are main, urgent"),
        ({}, {"sinfo": "a|0/1/0/1\n"}, "SLM-002 the cluster has no default partition: there are a"),
        ({"launch__nodes": 5}, {}, "SLM-003 launch.nodes=5 is more than the 4 of partition main"),
        ({"launch__partition": "urgent", "launch__nodes": 3}, {}, "SLM-003 .* the 2 of partition urgent"),
        ({}, {"refused": "allocation failure: Invalid qos"}, "SLM-004 Slurm would refuse the job: Invalid qos"),
    ],
)
def test_what_slurm_would_refuse_is_said_before_there_is_a_run(
    tmp_path: Path, fake: FakeSlurm, changes: dict[str, object], answers: dict[str, str], says: str
) -> None:
    for name, text in answers.items():
        fake.answer(name, text)
    with pytest.raises(RunError, match=says):
        ready([queued_recipe(tmp_path, **changes)], print)


def test_nodes_that_are_down_are_a_note(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sinfo", "main*|1/1/2/4\n")
    said: list[str] = []
    ready([queued_recipe(tmp_path, launch__nodes=3)], said.append)
    assert said == ["note: only 2 nodes of main are up: the job waits until there are 3"]


def test_a_machine_without_slurm_is_told_before_there_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"SLM-001 launch.kind=slurm, and sbatch, squeue, .* cannot be found"):
        ready([queued_recipe(tmp_path)], print)
    assert not (tmp_path / "runs").exists()


# --- submitting -----------------------------------------------------------------------------------------------------


def queue_run(tmp_path: Path, until: str = "report", **changes: object) -> tuple[RunDir, list[str], Stages]:
    run_dir, said, stages = start(queued_recipe(tmp_path, **changes)), [], Stages()
    submit([run_dir], until, said.append, launch=stages)
    return run_dir, said, stages


def test_rows_are_prepared_here_and_every_later_stage_waits_for_the_one_before(tmp_path: Path, fake: FakeSlurm) -> None:
    run_dir, said, stages = queue_run(tmp_path)
    assert stages.done == ["data"]
    jobs = fake.calls("sbatch")
    assert [job.split()[-1] for job in jobs] == [str(run_dir.job), "evaluate", "merge", "export", "report"]
    assert "--hold" in jobs[0] and "--dependency" not in jobs[0]
    for before, job in enumerate(jobs[1:], 1):
        assert f"--dependency=afterok:{before} --kill-on-invalid-dep=yes {run_dir.later}" in job
    assert fake.calls("scontrol") == ["scontrol release 1"]  # after slurm.json said which they are
    noted = read_json(run_dir.slurm)["jobs"]
    assert {stage: job["id"] for stage, job in noted.items()} == {
        stage: str(n) for n, stage in enumerate(list(STAGES)[1:], 1)
    }
    assert said[0] == "train     job 1" and said[1] == "evaluate  job 2, after 1"
    assert said[-3:] == [
        *("look: squeue --jobs=1,2,3,4,5", f"log: {run_dir.path}/train-1.log", "stop: scancel 1 2 3 4 5"),
    ]
    for script in (run_dir.job, run_dir.later):
        assert f"RUN={run_dir.path}\nPYTHON={sys.executable}\n" in script.read_text()


def test_inputs_are_hashed_and_the_text_beside_the_weights_is_read_before_there_is_a_job(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [start(queued_recipe(tmp_path, adapter__rank=rank)) for rank in (8, 16)]
    read: list[str] = []
    monkeypatch.setattr("finetune.record.sha256_file", lambda path: read.append(path.name) or "a" * 64)
    submit(runs, "report", print, link_folder(runs), launch=Stages())
    assert sorted(read) == ["config.json", "model.safetensors"]  # of the same base once for all tasks
    for run_dir in runs:
        assert [Path(name).name for name in read_json(run_dir.inputs)] == ["config.json", "model.safetensors"]
    assert not queue_run(tmp_path, "data")[0].inputs.exists()
    late = start(queued_recipe(tmp_path))
    (tmp_path / "base" / "LICENSE.txt").write_text("Terms of our own.")  # as if it had been fetched with the weights
    jobs = fake.calls("sbatch")
    with pytest.raises(RecipeError, match=r"LIC-007 the text of LICENSE\.txt"):
        submit([late], "report", print, launch=Stages())
    assert fake.calls("sbatch") == jobs and not late.inputs.exists()


def test_a_job_that_prepares_rows_for_a_training_of_its_own_hashes_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: Stages()(stage, run_dir))
    run_dir = start(queued_recipe(tmp_path))
    assert main(["data", f"run={run_dir.path}", "--here"]) == 0  # as train.sbatch types it
    assert [Path(name).name for name in read_json(run_dir.inputs)] == ["config.json", "model.safetensors"]


def test_only_what_is_not_done_is_queued_up_to_what_was_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    run_dir, _, stages = queue_run(tmp_path, until="merge")
    assert [job.split()[-1] for job in fake.calls("sbatch")[1:]] == ["evaluate", "merge"]
    carry_on(run_dir, until="evaluate", launch=Stages())
    submit([run_dir], "export", print, launch=stages)
    assert [job.split()[-1] for job in fake.calls("sbatch")[3:]] == ["merge", "export"]
    assert "--hold" in fake.calls("sbatch")[3]
    carry_on(run_dir, launch=Stages())
    assert submit([run_dir], "report", print, launch=stages) == []
    run_dir.record.unlink()  # the last stage is done when its record is written
    assert [job.stage for job in submit([run_dir], "report", print, launch=stages)] == ["report"]
    assert stages.done == ["data"]


def test_a_run_whose_jobs_live_is_not_queued_again(tmp_path: Path, fake: FakeSlurm) -> None:
    run_dir, _, _ = queue_run(tmp_path)
    fake.answer("squeue", "2 PENDING\n77 RUNNING\n1 RUNNING\n")
    before = fake.calls("sbatch")
    with pytest.raises(RunError, match=r"SLM-005 .* 1 \(train, running\), 2 \(evaluate, pending\).*scancel 1 2"):
        submit([run_dir], "report", print, launch=Stages())
    fake.answer("squeue", "77 RUNNING\n")
    submit([run_dir], "report", print, launch=Stages())
    assert len(fake.calls("sbatch")) == 2 * len(before)


def test_a_run_that_somebody_queued_while_its_rows_were_prepared_is_not_queued_again(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    run_dir = start(queued_recipe(tmp_path))

    def meanwhile(stage: str, where: RunDir) -> None:
        Stages()(stage, where)
        write_json(where.slurm, {"submitted": "", "jobs": {"train": {"id": "9", "log": "train-9.log"}}})
        fake.answer("squeue", "9 PENDING\n")

    with pytest.raises(RunError, match=r"SLM-005 .* 9 \(train, pending\)"):
        submit([run_dir], "report", print, launch=meanwhile)
    assert fake.calls("sbatch") == []


def test_a_run_that_is_in_use_is_not_queued(tmp_path: Path, fake: FakeSlurm) -> None:
    run_dir = carry_on(start(queued_recipe(tmp_path)), until="data", launch=Stages())
    with run_dir.lock(), pytest.raises(RunError, match="RUN-003"):
        submit([run_dir], "report", print)
    assert fake.calls("sbatch") == []


def test_a_chain_that_slurm_takes_only_in_part_is_taken_back(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("fail_at", "3")
    with pytest.raises(RunError, match="SLM-006 sbatch failed: no more jobs"):
        queue_run(tmp_path)
    assert fake.calls("scancel") == ["scancel 1 2"] and fake.calls("scontrol") == []
    assert not (tmp_path / "runs" / "job" / "0001" / "slurm.json").exists()


def test_nothing_is_queued_behind_a_gate_that_was_not_met(tmp_path: Path, fake: FakeSlurm) -> None:
    run_dir = start(queued_recipe(tmp_path))
    with pytest.raises(GateError):
        carry_on(run_dir, launch=Stages(passed=False))
    with pytest.raises(GateError):
        submit([run_dir], "report", print, launch=Stages())
    assert fake.calls("sbatch") == []


def test_the_runs_of_a_sweep_become_arrays_whose_tasks_wait_for_their_own(tmp_path: Path, fake: FakeSlurm) -> None:
    runs = [start(queued_recipe(tmp_path, adapter__rank=rank)) for rank in (8, 16, 32)]
    links, stages = link_folder(runs), Stages()
    submit(runs, "evaluate", print, links, launch=stages)
    assert stages.done == ["data"] * 3
    train, evaluate = fake.calls("sbatch")
    assert train.endswith(str(runs[0].job)) and "#SBATCH --array=0-2" in runs[0].job.read_text()
    assert "--dependency=aftercorr:1 --kill-on-invalid-dep=yes" in evaluate
    assert "#SBATCH --array=0-2" in runs[0].later.read_text()
    for task, run_dir in enumerate(runs):
        assert read_json(run_dir.slurm)["jobs"]["evaluate"] == {"id": f"2_{task}", "log": "evaluate-2.log"}
    fake.answer("squeue", "2_1 PENDING\n2_2 PENDING\n")
    with pytest.raises(RunError, match=r"SLM-005 .*/0002 has jobs already: 2_1"):
        submit(runs, "evaluate", print, links, launch=stages)


def test_several_values_of_a_word_become_arrays(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: Stages()(stage, run_dir))
    words = [
        "recipe=legal_quickstart",
        "scale=rehearsal",
        "launch=slurm",
        "adapter.rank=2,4",
        f"runs_dir={tmp_path}/runs",
    ]
    assert main(["-m", *words, f"cache_dir={tmp_path}/cache"]) == 0
    assert "#SBATCH --array=0-1\n" in (tmp_path / "runs" / "legal_quickstart" / "0001" / "job.sbatch").read_text()
    said = capsys.readouterr().out
    assert f"task 1: {tmp_path}/runs/legal_quickstart/0002" in said
    assert "train     job 1 (array of 2)" in said and "report    job 5 (array of 2), after 4" in said
    folder = f"{tmp_path}/runs/legal_quickstart/array-0001"
    assert f"table  job 6, when all of these have ended: {folder}/sweep.md and sweep.png" in said
    assert f"python -m finetune table run={folder}" in said
    job = fake.calls("sbatch")[5].split()
    assert {"--dependency=afterany:1:2:3:4:5", f"{folder}/table.sbatch"} <= set(job)
    asked = directives(Path(folder, "table.sbatch").read_text())
    assert "--ntasks=1" in asked and f"--output={folder}/table-%j.log" in asked
    assert not any(option.startswith(("--array", "--gpus")) for option in asked)
    assert main(["table", f"run={folder}"]) == 0
    assert "adapter.rank=2" in capsys.readouterr().out
    assert main(["table", "recipe=legal_quickstart"]) == 2


def test_a_sweep_is_queued_also_where_slurm_refuses_the_job_of_its_table(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: Stages()(stage, run_dir))
    page = Console(record=True, width=300)
    recipes = [queued_recipe(tmp_path, adapter__rank=rank) for rank in (8, 16)]
    assert sweep.queue(recipes, "train", page) == 0
    assert len(fake.calls("sbatch")) == 1  # nothing is scored
    fake.answer("fail_at", "4")
    assert sweep.queue(recipes, "evaluate", page) == 0
    assert "note: the table has no job of its own: SLM-006 sbatch failed: no more jobs" in page.export_text()
    assert fake.calls("scancel") == []


def test_the_job_at_the_end_of_a_sweep_leaves_a_table_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeSlurm
) -> None:
    runs = [start(queued_recipe(tmp_path, adapter__rank=rank)) for rank in (8, 16, 32)]
    links = link_folder(runs)
    job = slurm.queue_table(links, [slurm.Queued("train", "7", Path())], queued_recipe(tmp_path))
    assert job.log == links / "table-1.log"
    for run_dir in runs[:2]:
        carry_on(run_dir, launch=Stages())
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(["bash", str(links / "table.sbatch")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"written: {links}/sweep.md, sweep.json and sweep.png" in done.stdout
    kept = read_json(links / "sweep.json")["jobs"]
    assert [(job["words"], job["run"], job["tuned_loss"]) for job in kept] == [
        *((["adapter.rank=8"], "../0001", 1.0), (["adapter.rank=16"], "../0002", 1.0)),
        (["adapter.rank=32"], "../0003", None),
    ]
    table = (links / "sweep.md").read_text()
    assert table.startswith(f"`python -m finetune table run={links}`") and "| adapter.rank=32 | not scored |" in table
    assert (links / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_a_folder_that_cannot_be_written_is_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    links = link_folder([start(ready_recipe(tmp_path, adapter__rank=rank)) for rank in (8, 16)])

    def refused(target: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr("finetune.sweep_folder.write_json", refused)
    assert main(["table", f"run={links}"]) == 0
    said = capsys.readouterr().out
    assert "adapter.rank=16" in said and f"note: not written: {links}/sweep.json: Permission denied" in said


def test_a_job_is_queued_by_its_words_and_again_by_its_folder(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: Stages()(stage, run_dir))
    words = ["recipe=legal_quickstart", "scale=rehearsal", "launch=slurm", f"cache_dir={tmp_path}/cache"]
    fake.answer("refused", "allocation failure: Invalid account")
    assert main(["train", *words, f"runs_dir={tmp_path}/runs"]) == 3
    assert "SLM-004 Slurm would refuse the job: Invalid account" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    (fake.folder / "refused").unlink()
    assert main(["train", *words, f"runs_dir={tmp_path}/runs"]) == 0
    run_dir = tmp_path / "runs" / "legal_quickstart" / "0001"
    assert f"run: {run_dir}" in capsys.readouterr().out and len(fake.calls("sbatch")) == 1
    assert main([f"run={run_dir}"]) == 0
    assert len(fake.calls("sbatch")) == 1 + 5
    fake.answer("squeue", "2 RUNNING\n")
    assert main([f"run={run_dir}"]) == 3
    assert "SLM-005" in capsys.readouterr().err


def test_a_sweep_over_resources_is_no_array(tmp_path: Path, fake: FakeSlurm) -> None:
    recipes = [queued_recipe(tmp_path, launch__nodes=n) for n in (1, 2)]
    with pytest.raises(RecipeError, match="SLM-007"):
        sweep.queue(recipes, "report", Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_scores_of_queued_jobs_are_a_table_later(tmp_path: Path) -> None:
    runs = [start(ready_recipe(tmp_path, adapter__rank=rank)) for rank in (8, 16)]
    carry_on(runs[1], launch=Stages())
    found = sweep.jobs_in(link_folder(runs))
    assert [(job.words, job.run_dir.path) for job in found] == [
        *((("adapter.rank=8",), runs[0].path), (("adapter.rank=16",), runs[1].path)),
    ]
    page = Console(record=True, width=200)
    sweep_table.show_jobs(found, page)
    text = page.export_text()
    assert text.index("adapter.rank=16") < text.index("adapter.rank=8 ") and "1.0000" in text and "not scored" in text
    with pytest.raises(RunError, match="RUN-004"):
        sweep.jobs_in(tmp_path / "base")


# --- the command line -----------------------------------------------------------------------------------------------


def test_words_for_what_runs_inside_a_job() -> None:
    request = read(["evaluate", "run=r", "--here"])
    assert request.here and request.run == "r"
    assert read(["data", "recipe=x", "--run-file=f"]).run_file == "f"
    for words in (["plan", "recipe=x", "--here"], ["-m", "recipe=x", "--here"], ["run=r", "--run-file", "f"]):
        with pytest.raises(RecipeError, match="CFG-011 --"):
            read(words)


def test_the_file_of_a_run_makes_the_same_words_carry_it_on(tmp_path: Path) -> None:
    recipe = ready_recipe(tmp_path, train__precision="auto")
    run_dir, file = start(recipe), tmp_path / "kept"
    _keep(run_dir, str(file))
    request = read(["recipe=x", f"--run-file={file}"])
    assert _kept(request, recipe) == settled(recipe)
    assert request.run_dir == RunDir(run_dir.path.absolute())
    with pytest.raises(RunError, match=r"RUN-006 .*was started with other settings"):
        _kept(request, ready_recipe(tmp_path, train__precision="auto", seed=18))


def test_a_script_is_written_for_a_job_that_is_there_already(tmp_path: Path) -> None:
    run_dir = start(queued_recipe(tmp_path))
    done = subprocess.run([sys.executable, "-m", "finetune.slurm", str(run_dir.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == run_dir.job and run_dir.job.read_text().startswith("#!/bin/bash\n#SBATCH")
    for words in ([], [str(tmp_path)]):
        done = subprocess.run([sys.executable, "-m", "finetune.slurm", *words], capture_output=True, text=True)
        assert done.returncode == 3 and "Traceback" not in done.stderr


def test_a_notebook_is_told_that_jobs_are_queued_from_the_shell(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="SLM-009"):
        run(queued_recipe(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_jobs_of_a_run_without_a_note_are_not_asked_about(tmp_path: Path) -> None:
    run_dir = start(queued_recipe(tmp_path))
    slurm.refuse_queued(run_dir)  # there is no squeue here
    write_json(run_dir.slurm, {"submitted": "", "jobs": {}})
    slurm.refuse_queued(run_dir)
