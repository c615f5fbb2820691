"""Where a stage runs: in this process, or training as one process per device, started, watched and ended from here."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finetune.compose import read_recipe
from finetune.errors import Preempted, RunError
from finetune.rundir import RunDir
from finetune.worker import work

PATIENCE_SECONDS = 30.0
"""How long the other processes of a training may go on after one has failed, before they are killed."""


def launch(stage: str, run_dir: RunDir) -> None:
    """Carries out one stage as `launch` of the recipe says. Raises what the stage raises, RunError if it is busy."""
    recipe = read_recipe(run_dir.recipe)
    try:
        if stage == "train" and (recipe.launch.devices > 1 or recipe.engine == "unsloth"):  # it patches its process
            from finetune.source import base_folder

            base_folder(recipe)  # fetched or made once, before there are several processes that wait for it
            run_dir.requeue.unlink(missing_ok=True)
            command = [sys.executable, "-m", "finetune.worker", stage, str(run_dir.path)]
            together(command, recipe.launch.devices, recipe.launch.cpu_threads)
            if run_dir.requeue.exists():
                raise stopped(run_dir)
        else:
            work(stage, run_dir, recipe.launch.cpu_threads)
    finally:
        give_memory_back()


def together(command: Sequence[str], processes: int, cpu_threads: int = 0) -> None:
    """Runs a command as several processes that find each other, or as one that looks for none, until all ended well.

    Signals are handed on to all of them, a second Ctrl-C ends them. When one fails the others are ended. They
    end with this process, however it ends. Raises RunError (LCH-006) when one fails; it has said why.
    """
    address = {"FINETUNE_PARENT": str(os.getpid())}
    if processes > 1:  # Accelerate would make a group of one, too
        address |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    address["OMP_NUM_THREADS"] = str(cpu_threads or max(1, (os.cpu_count() or 1) // processes))
    running: list[subprocess.Popen[bytes]] = []
    with handed_on(running):
        try:
            for rank in range(processes):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
                place = place if processes > 1 else {}
                environment = os.environ | address | place
                running.append(subprocess.Popen(command, env=environment, start_new_session=True))
            _wait(running)
        finally:
            end(running)


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> None:
    until = math.inf
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        if until == math.inf and any(process.poll() for process in running):
            until = time.monotonic() + PATIENCE_SECONDS  # the others hear of it at their next agreement
        time.sleep(0.05)
    failed = {rank: code for rank, process in enumerate(running) if (code := process.poll())}
    for rank, code in failed.items():
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        what = f"process {rank} of {len(running)} ended with {how}"
        raise RunError("LCH-006", what, "it says why above, or the system ended it", "the same run again with run=")


def end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills what still runs of these processes and whatever they started."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in running:
        process.wait()


@contextmanager
def handed_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside the block TERM, USR1 and Ctrl-C ask the processes to stop; a second Ctrl-C is KeyboardInterrupt."""
    interrupts = 0

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # of a notebook, say: Python lets none be handled
        yield
        return
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before[number] = signal.signal(number, tell)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(run_dir: RunDir) -> Preempted:
    """The exception of a training that left REQUEUE."""
    words = run_dir.requeue.read_text(encoding="utf-8").split()
    return Preempted(words[0], int(words[3]), int(words[5]))


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def give_memory_back() -> None:
    """Returns what the stage held to the system, so that the next one does not come on top of it."""
    gc.collect()  # a trainer and its model refer to each other
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
        libc.malloc_trim(0)
