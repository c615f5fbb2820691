"""A real Slurm cluster of two nodes on this machine, for tests: installed if need be, started, ended by its PIDs."""

from __future__ import annotations

import fcntl
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "scancel", "srun")
INSTALL = "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge"
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
FirstJobId={first_job}
MinJobAge=600
KillWait=5
ReturnToService=2
SlurmdTimeout=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""Nodes of one host, each with a port of its own. `cred_expire`: a requeued job waits that long, 120 s by default."""


class Cluster:
    """The running cluster; clients find it through SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node."""
        run("slurmd", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """Ends the daemon of a node as a crash would, and tells Slurm, which would notice later by itself."""
        os.kill(self.pid(f"slurmd.{name}"), signal.SIGKILL)
        run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def resume_node(self, name: str) -> None:
        """Brings a failed node back."""
        self.start_node(name)
        _well("scontrol", "update", f"nodename={name}", "state=resume")  # it may be back by itself (ReturnToService)
        until(lambda: _idle_nodes() > 0, 20, self.logs)

    def pid(self, daemon: str) -> int:
        """Process id of a daemon."""
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in sorted((self.folder / "log").glob("*.log")))


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2, in the partitions main (default) and urgent, which takes nodes from main."""
    require_slurm()
    made = Cluster(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(made.conf)
    try:
        _start(made)
        yield made
    finally:
        _stop(made)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
    assert left_over(str(folder)) == []


def require_slurm() -> None:
    """Installs Slurm where it is missing and root may; otherwise fails with what to type. It never skips."""
    with (Path(tempfile.gettempdir()) / f"install-slurm-{os.getuid()}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # apt-get refuses a second one at a time
        missing = [name for name in PROGRAMS if not shutil.which(name)]
        if missing and os.geteuid() == 0 and shutil.which("apt-get"):
            done = subprocess.run(["bash", "-c", INSTALL], capture_output=True, text=True)
            missing = [name for name in PROGRAMS if not shutil.which(name)]
            assert not missing, f"Slurm could not be installed: {done.stderr[-500:]}\nType: {INSTALL}"
    assert not missing, f"the tests of Slurm need {', '.join(missing)}. Type as root: {INSTALL}"


def run(*words: str) -> str:
    """What a program prints. It must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout


def until(condition: Callable[[], T], seconds: float, what: Callable[[], str] | str) -> T:
    """The first true value of the condition; fails after that long, saying what was waited for."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.1)
    return value


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


def left_over(*marks: str) -> list[str]:
    """Live processes, other than this one, whose command line and environment name every mark. A zombie is none."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) in (os.getpid(), os.getppid()):
            continue
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            words = (folder / "cmdline").read_bytes()
            about = words + (folder / "environ").read_bytes()
        except OSError:
            continue  # it has ended meanwhile, or is another user's
        if state != "Z" and all(mark.encode() in about for mark in marks):
            line = words.replace(b"\0", b" ").decode(errors="replace")
            found.append(f"{folder.name}: {line[:200]}")
    return found


@contextmanager
def paused(*marks: str) -> Iterator[None]:
    """Inside the block the one process with these marks stands still, so that what happens finds it where it was."""
    (process,) = left_over(*marks)
    pid = int(process.partition(":")[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if _alive(pid):
            os.kill(pid, signal.SIGCONT)


def _start(made: Cluster) -> None:
    folder = made.folder
    for name in ("state", "log", "run", "spool.n1", "spool.n2", "munge"):
        (folder / name).mkdir(parents=True, mode=0o700 if name == "munge" else 0o755)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    port, port1, port2 = _free_ports(3)
    made.conf.write_text(
        CONF.format(
            folder=folder,
            user=getpass.getuser(),
            host=socket.gethostname().partition(".")[0],
            port=port,
            port1=port1,
            port2=port2,
            first_job=random.randrange(1, 900),  # ranks meet at a port that follows from the id of the job
        )
    )
    run(
        *("munged", f"--key-file={key}", f"--socket={folder}/run/munge.socket", f"--pid-file={folder}/run/munged.pid"),
        *(f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munge/seed", "--num-threads=2", "--force"),
    )
    until(lambda: _well("munge", "-n", "-S", f"{folder}/run/munge.socket"), 20, made.logs)
    run("slurmctld", "-f", str(made.conf))
    for name in ("n1", "n2"):
        made.start_node(name)
    until(lambda: _idle_nodes() == 2, 60, made.logs)


def _stop(made: Cluster) -> None:
    if _well("scancel", f"--user={getpass.getuser()}"):
        end = time.monotonic() + 30
        while _well("squeue") and run("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.2)
    for daemon in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
        if (made.folder / "run" / f"{daemon}.pid").is_file():
            _end(made.pid(daemon))


def _end(pid: int) -> None:
    """Ends a process: TERM, and KILL after a while."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        end = time.monotonic() + seconds
        while _alive(pid) and time.monotonic() < end:
            os.kill(pid, number)
            time.sleep(0.2)


def _alive(pid: int) -> bool:
    """Whether a process runs; where nobody reaps, a dead one stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _well(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, timeout=60).returncode == 0


def _idle_nodes() -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-p", "main"], capture_output=True, text=True)
    return len(done.stdout.splitlines())


def _free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":  # a cluster to try things on: python -m tests.slurm_cluster FOLDER, until Ctrl-C
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # so that they end the wait, not Python
    with cluster(Path(sys.argv[1]).resolve()) as here:
        print(f"export SLURM_CONF={here.conf}", flush=True)
        signal.sigwait([signal.SIGINT, signal.SIGTERM])
