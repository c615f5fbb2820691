"""What Slurm's own programs say and do: `preflight`, `send`, `release`, `alive`, `cancel`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence

from finetune.errors import RunError
from finetune.recipe import Launch

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
SECONDS = 120
"""How long one of them may take; a busy controller is slow, a dead one makes them wait for ever."""


def preflight(launch: Launch, scripts: Iterable[str]) -> list[str]:
    """Notes worth reading about the cluster, none when all is well.

    Raises RunError when Slurm's programs, the partition or its nodes are not there, or when Slurm would refuse one of
    the scripts: an account, a limit, GPUs that no node has.
    """
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise RunError(
            "SLM-001",
            f"launch.kind=slurm, and {', '.join(missing)} cannot be found",
            "jobs are submitted with Slurm's own programs",
            "a machine of the cluster that has them, or launch=local",
        )
    notes = _partition(launch)
    for script in scripts:
        said = _run("sbatch", "--test-only", text=script)
        if said.returncode:
            why = _words(said.stderr).removeprefix("allocation failure: ")
            fix = "other values of launch.partition, account, time, memory, cpus_per_task, devices or gpus=false"
            raise RunError("SLM-004", "Slurm would refuse the job", why, fix)
    return notes


def send(script: str, *words: str, options: Sequence[str] = ()) -> str:
    """The id of the job that the file `script` became, with these words behind it. Raises RunError (SLM-006)."""
    return _checked("sbatch", "--parsable", *options, script, *words).strip().partition(";")[0]


def release(ids: Sequence[str]) -> None:
    """Lets held jobs begin. Raises RunError (SLM-006)."""
    _checked("scontrol", "release", *ids)


def cancel(ids: Sequence[str]) -> None:
    """Cancels jobs; those that are gone are no error."""
    if ids:
        _run("scancel", *ids)


def alive(ids: Sequence[str]) -> dict[str, str]:
    """Id -> state of those jobs that are queued, run or end just now. Raises RunError when Slurm does not answer."""
    if not ids:
        return {}
    jobs = ",".join(dict.fromkeys(id.partition("_")[0] for id in ids))
    said = _run("squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={jobs}")
    if said.returncode and "Invalid job id" not in said.stderr:
        raise _failed("squeue", said.stderr)
    found = dict(line.split() for line in said.stdout.splitlines() if line.strip())
    return {id: found[id] for id in ids if id in found}


def _partition(launch: Launch) -> list[str]:
    """Notes about the partition. Raises RunError when there is none of that name, or it is too small."""
    lines = _checked("sinfo", "--noheader", "--all", "--format=%P|%F").splitlines()
    rows = [line.strip().split("|") for line in lines if "|" in line]
    nodes = {name.rstrip("*"): [int(n) for n in counts.split("/")] for name, counts in rows}
    usual = [name.rstrip("*") for name, _ in rows if name.endswith("*")]
    wanted = launch.partition.split(",") if launch.partition else usual
    exist = ", ".join(nodes) or "none"
    if not wanted:
        raise RunError(
            "SLM-002",
            "the cluster has no default partition",
            f"there are {exist}",
            "launch.partition=NAME, one of them",
        )
    if unknown := [name for name in wanted if name not in nodes]:
        raise RunError(
            "SLM-002",
            f"launch.partition={launch.partition}: Slurm has no partition {', '.join(unknown)}",
            f"there are {exist}",
            "launch.partition=NAME, one of them",
        )
    largest = max(wanted, key=lambda name: nodes[name][3])
    if nodes[largest][3] < launch.nodes:
        raise RunError(
            "SLM-003",
            f"launch.nodes={launch.nodes} is more than the {nodes[largest][3]} of partition {largest}",
            "the job could never begin",
            f"launch.nodes={nodes[largest][3]}, or another launch.partition",
        )
    up = max(nodes[name][3] - nodes[name][2] for name in wanted)
    down = f"only {up} nodes of {largest} are up: the job waits until there are {launch.nodes}"
    return [down] if up < launch.nodes else []


def _checked(*words: str) -> str:
    said = _run(*words)
    if said.returncode:
        raise _failed(words[0], said.stderr)
    return said.stdout


def _run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(words[0], str(error)) from None


def _failed(program: str, said: str) -> RunError:
    return RunError("SLM-006", f"{program} failed", _words(said), "sinfo, to see whether Slurm answers; then again")


def _words(said: str) -> str:
    """What a program of Slurm said, on one line, without its name in front."""
    return "; ".join(line.partition(": error: ")[2] or line.partition(": ")[2] or line for line in said.splitlines())
