"""A command that ends when whoever started it ends: `python tether.py COMMAND ...`, with a pipe as standard input.

Run by its path and with the standard library alone, so that the command may belong to another Python. The other end of
the pipe is with the process that wants the command: when it closes, also because that process was killed, the command
and everything it started (all of the process group that this file must be the first of) are asked to end, and killed
after a while.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

PATIENCE_SECONDS = 10.0
"""How long a command that was asked to end may take."""


def main(command: list[str]) -> int:
    """The exit code of the command, or a death by SIGKILL where it had to be ended."""
    # It goes to the whole group, and this process sees to the end of it. Not SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    wanted = True
    while wanted and child.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.2)
        wanted = not ready or bool(os.read(0, 1024))
    until = time.monotonic() + PATIENCE_SECONDS
    os.killpg(0, signal.SIGTERM)  # also what a command that ended by itself has left behind
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    if wanted:
        code = child.returncode
        print(f"(ended with {f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})", flush=True)
    os.killpg(0, signal.SIGKILL)
    return 0  # never reached where a process can be killed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
