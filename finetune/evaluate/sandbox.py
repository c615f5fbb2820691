"""Generated code, run where it can do no harm: `run_code(program) -> Outcome`. Never in a process of ours.

A child takes everything from itself that the code does not need (`sandbox_child.py` says what) and then becomes a fresh
interpreter with an empty environment, in a folder of its own. Here its time and its output are limited. A machine that
cannot confine it so runs no code at all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import RunError

SECONDS = 10.0
"""Wall-clock time of one program; its processor time has the same limit."""
MEMORY_MIB = 1024
"""Address space of one program."""
OUTPUT_BYTES = 1 << 16
"""What a program may print; one that prints more is ended."""
CHILD = Path(__file__).with_name("sandbox_child.py")
"""What confines itself and becomes the program."""
CANNOT = 90
"""Exit code of a child that could not confine itself."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its last line."""
    how: str
    """`passed`, `failed` (an exception, an exit of its own, or a signal), `time` or `output`."""
    output: str
    """What it printed, at most OUTPUT_BYTES."""


def run_code(program: str, seconds: float = SECONDS, memory_mib: int = MEMORY_MIB) -> Outcome:
    """How `program` ended, an exception and a limit being failures; it has passed when its last line was reached.

    Raises RunError TSK-009 on a machine that cannot confine it.
    """
    if sys.platform != "linux":
        raise _cannot(f"this is {sys.platform}")
    reached = f"reached {secrets.token_hex(16)}"
    with tempfile.TemporaryDirectory(prefix="finetune-code-") as folder:
        file = Path(folder).resolve() / "program.py"
        file.write_text(f"{program}\nprint({reached!r}, flush=True)\n", encoding="utf-8", errors="replace")
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", CHILD, file, str(max(1, round(seconds))), str(memory_mib)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            printed, how = _read(child, time.monotonic() + seconds)
        finally:
            _end(child)
    output = printed.decode("utf-8", errors="replace")
    if child.returncode == CANNOT and output.startswith("cannot confine: "):
        raise _cannot(output.removeprefix("cannot confine: ").strip())
    passed = not how and child.returncode == 0 and output.rstrip().endswith(reached)
    return Outcome(passed, how or ("passed" if passed else "failed"), output.replace(reached, "").rstrip())


def sandbox_problem() -> str:
    """Why code cannot be confined on this machine, or ""."""
    try:
        outcome = run_code("")
    except RunError as error:
        return error.why
    return "" if outcome.passed else f"an empty program ended with {outcome.how}: {outcome.output[-200:]}"


def _read(child: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, str]:
    """(what it printed, why it must be ended or "" when it closed its output)."""
    assert child.stdout is not None
    printed = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.select(left):
                return bytes(printed), "time"
            piece = os.read(child.stdout.fileno(), 1 << 14)
            if not piece:
                break
            printed += piece
            if len(printed) > OUTPUT_BYTES:
                return bytes(printed[:OUTPUT_BYTES]), "output"
    try:  # a program may close its output and go on
        child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(printed), "time"
    return bytes(printed), "time" if child.returncode == -signal.SIGXCPU else ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills the whole group of the child; it cannot have left the group, for it cannot start a process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def _cannot(why: str) -> RunError:
    return RunError(
        "TSK-009",
        "generated code cannot be confined on this machine",
        why,
        "Linux 5.13 or later on x86_64 or aarch64 with Landlock and seccomp, or leave the code task out",
    )
