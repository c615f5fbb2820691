"""Stand-ins for Slurm's programs: they note how they are called and answer what a test wants. No cluster, no root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROGRAMS = {
    "sbatch": """\
if [ "$1" = --test-only ]; then
  cat > "$F/tested"
  [ ! -e "$F/refused" ] || { echo "sbatch: error: $(cat "$F/refused")" >&2; exit 1; }
  exit
fi
n=$(($(cat "$F/count" 2>/dev/null) + 1)); echo $n > "$F/count"
[ "$n" != "$(cat "$F/fail_at" 2>/dev/null)" ] || { echo "sbatch: error: no more jobs" >&2; exit 1; }
echo "$n;cluster"
""",
    "squeue": """\
[ -e "$F/squeue" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
cat "$F/squeue"
""",
    "sinfo": 'cat "$F/sinfo"\n',
    "scancel": "",
    "scontrol": """\
case "$1 $2" in
  "show hostnames") echo node1; echo node2 ;;
  "show node") echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3 Port=1" ;;
  "show job") echo "JobId=$3 JobName=x JobState=$(cat "$F/state" 2>/dev/null || echo RUNNING) Reason=None" ;;
  "requeue "*) kill -TERM $PPID ;; # Slurm ends the script
esac
""",
    # Two ranks, as srun would start them, without --options of its own.
    "srun": """\
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=${RANKS:-2} SLURM_NNODES=1
trap 'kill -USR1 $pids' USR1
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids="$pids $!"
done
code=0
for pid in $pids; do
  while :; do wait $pid; c=$?; kill -0 $pid 2>/dev/null || break; done
  [ $c = 0 ] || code=$c
done
exit $code
""",
}
SINFO = "main*|1/3/0/4\nurgent|0/2/0/2\n"


class FakeSlurm:
    """The programs in a folder that stands first on PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "answers"
        self.folder.mkdir(parents=True)
        for name, body in PROGRAMS.items():
            program = folder / name
            program.write_text(f'#!/bin/bash\nF={self.folder}\necho "{name} $*" >> "$F/calls"\n{body}')
            program.chmod(0o755)
        self.answer("sinfo", SINFO)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(self, name: str, text: str) -> None:
        """What a program says from now on, or what it is to do: refused, fail_at, squeue, sinfo, state."""
        (self.folder / name).write_text(text)

    def calls(self, program: str = "") -> list[str]:
        """How the programs were called so far, without the question whether a job could be submitted."""
        noted = self.folder / "calls"
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [line for line in lines if line.startswith(program) and "--test-only" not in line]
