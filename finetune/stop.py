"""A request to stop, which training honours at the end of an update: `asked_to_stop()`, or `listen()` for good."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm warns with USR1, systems end processes with TERM, people press Ctrl-C."""


class Request:
    """Whether and by what this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = ""
        """Name of the first signal that came, e.g. SIGTERM."""
        self._interrupts = 0

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal. A second Ctrl-C does not wait for the update: KeyboardInterrupt."""
        if not self.signal:
            self.signal = signal.Signals(number).name
            more = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            said = f"{self.signal}: a checkpoint follows at the end of this update{more}."
            if "RANK" not in os.environ or os.environ["RANK"] == "0":  # of several processes one says it
                print(said, file=sys.stderr, flush=True)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does, however that ends (Linux: prctl)."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        parent_death_signal = 1
        libc.prctl(parent_death_signal, signal.SIGKILL)


_listening: list[Request] = []


def listen() -> None:
    """From now on this process notes signals instead of dying of them. For one that does nothing but train."""
    request = Request()
    for number in SIGNALS:
        signal.signal(number, request.heard)
    _listening.append(request)


@contextmanager
def asked_to_stop() -> Iterator[Request]:
    """Notes signals inside the block; those since `listen` count too. Outside the main thread none are noted."""
    if _listening or threading.current_thread() is not threading.main_thread():
        yield _listening[0] if _listening else Request()
        return
    request = Request()
    before = {number: signal.signal(number, request.heard) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
