"""Commands of this project as forks of a process that has done the imports: `Forked("finetune", ["train", ...])`.

A training of a test is over in three seconds, and another process spends eight to import its libraries. So one process,
`python -m tests.warm`, imports them once, computes nothing and starts no thread; every command is a fork of it, with an
environment, a session, a random state and outputs of its own. A fork has the hash seed of that process and runs no exit
handlers: each test that stands for what a user types has at least one real command beside its forks.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
TORCH = (
    "finetune.worker",
    "matplotlib.backends.backend_agg",
    "pandas",
    "pyarrow.parquet",
    "requests",
    "sklearn.metrics",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
)
"""What transformers imports in its turn: for a training that must import transformers itself."""
IMPORTED = {
    "torch": TORCH,
    "all": (
        *TORCH,
        "finetune.commands",
        "finetune.data.prepare",
        "finetune.merge.prove",
        "finetune.train.picture",
        "finetune.train.rehearsal",
        "finetune.train.results",
        "finetune.train.trackers",
        "finetune.train.trainer",
        "trl.trainer.sft_trainer",
    ),
}
"""Kind of warm process -> what it imports: all that a training does, most of it in functions; or no more than torch."""


class _Process:
    """What callers use of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """The exit code, or None while it runs; a signal is a negative one."""
        if self.returncode is None:
            self.returncode = self._ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + timeout if timeout is not None else float("inf")
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal while it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self) -> int | None:
        raise NotImplementedError


class Child(_Process):
    """A fork of this very process, which must not have computed anything: `main` of a module with words."""

    def __init__(
        self, module: str, words: Sequence[str], environment: Mapping[str, str], outputs: Sequence[int] = (1, 2)
    ) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        super().__init__(os.fork())
        if self.pid == 0:
            code = 1
            try:
                code = _become(module, words, environment, outputs)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        while os.getsid(self.pid) != self.pid:  # from then on it can be killed with what it started
            time.sleep(0.001)

    def _ended(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def _become(module: str, words: Sequence[str], environment: Mapping[str, str], outputs: Sequence[int]) -> int:
    """The exit code of `python -m MODULE WORDS`."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(environment)
    import numpy

    numpy.random.seed()  # a process begins with a state of its own; Python sees to `random`
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(":") if place and place not in sys.path]
    sys.argv = [module, *words]
    found = importlib.import_module("finetune.__main__" if module == "finetune" else module)
    merging = proofs_are_forks(Child) if "finetune.merge" in sys.modules else nullcontext()
    with ranks_are_forks(Child), merging:
        code = found.main(list(words))
    return int(code or 0)


def ranks_are_forks(kind: Callable[..., Any]) -> Any:
    """A context in which the processes of a training are forks instead of new ones."""

    def started(command: Sequence[str], env: Mapping[str, str], start_new_session: bool) -> Any:
        assert start_new_session
        return kind(*_module(command), env)

    return patch("finetune.launch.subprocess", SimpleNamespace(Popen=started))


def proofs_are_forks(kind: Callable[..., Any] | None = None) -> Any:
    """A context in which the process that proves a merge, apart from the one that merges, is a fork of a third."""
    made = kind or functools.partial(Forked, outputs=(1, 2))

    def ran(command: Sequence[str], check: bool, env: Mapping[str, str]) -> Any:
        assert not check
        return SimpleNamespace(returncode=made(*_module(command), env).wait())

    return patch("finetune.merge.subprocess", SimpleNamespace(run=ran))


def _module(command: Sequence[str]) -> tuple[str, Sequence[str]]:
    """(module, words) of a command."""
    assert list(command[:2]) == [sys.executable, "-m"], command
    return command[2], command[3:]


class Forked(_Process):
    """A fork of the warm process, from any other; what it prints comes in `stdout`, a pipe, or goes to `outputs`."""

    def __init__(
        self,
        module: str,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        outputs: Sequence[int] = (),
        imported: str = "all",
    ) -> None:
        self._imported = imported
        to_read, to_write = (-1, -1) if outputs else os.pipe()
        job = {"module": module, "words": list(words), "env": dict(environment or os.environ), "cwd": str(Path.cwd())}
        pid: int = _ask(imported, job, outputs or (to_write, to_write))
        super().__init__(pid)
        if not outputs:
            os.close(to_write)
            self.stdout = open(to_read, encoding="utf-8")  # noqa: PTH123, SIM115  # closed by `communicate`

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """(everything it printed, None)."""
        with self.stdout:
            said = self.stdout.read()
        self.wait(timeout)
        return said, None

    def _ended(self) -> int | None:
        code: int | None = _ask(self._imported, {"poll": self.pid})
        return code


@functools.cache
def _warm(imported: str) -> socket.socket:
    """The connection to a warm process of this one, which ends with it."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "tests.warm", imported, str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=ROOT)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _ask(imported: str, question: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
    data = json.dumps(question).encode()
    connection = _warm(imported)
    connection.sendall(len(data).to_bytes(4, "big"))
    socket.send_fds(connection, [data[:1]], descriptors)
    connection.sendall(data[1:])
    return json.loads(_take(connection, int.from_bytes(_take(connection, 4), "big")))


def _take(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            raise EOFError("the warm process has ended, or who asked it has")
        found += more
    return found


def serve(connection: socket.socket) -> None:
    """Answers until the other end is closed; then nothing that it started lives on."""
    children: dict[int, Child] = {}
    while True:
        try:
            size = int.from_bytes(_take(connection, 4), "big")
        except EOFError:
            break
        first, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        question = json.loads(first + _take(connection, size - 1))
        if "poll" in question:
            answer = children[question["poll"]].poll()
        else:
            os.chdir(question["cwd"])
            child = Child(question["module"], question["words"], question["env"], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children[child.pid], answer = child, child.pid
        data = json.dumps(answer).encode()
        connection.sendall(len(data).to_bytes(4, "big") + data)
    for child in children.values():
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _other(path: Path) -> bool:
    return path.parent.name != str(os.getpid())


def main(words: list[str]) -> None:
    """Imports, then serves."""
    import gc

    for name in IMPORTED[words[0]]:
        importlib.import_module(name)
    random.seed()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm") if _other(path)}
    assert threads <= {"jemalloc_bg_thd"}, f"{threads}: a fork would lack them"  # Arrow's allocator starts its own anew
    gc.collect()
    gc.freeze()  # what is there now stays as it is, and so is shared with every fork
    serve(socket.socket(fileno=int(words[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
