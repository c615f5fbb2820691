"""What both ways of fetching share: the error, a child process that is watched, a place to write that is held."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError
from finetune.rundir import TEMPORARY

if TYPE_CHECKING:
    from rich.console import Console

NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Connection refused|Connection reset"
    r"|Network is unreachable|Temporary failure in name resolution|Max retries exceeded|timed out|ConnectError"
)
"""What pip, urllib3 and httpx say when a server cannot be reached."""


class FetchError(FinetuneError):
    """Something that is not in the cache and could not be brought there."""


def run_child(words: list[str], environment: dict[str, str], title: str, folder: Path) -> tuple[int, str]:
    """Exit code and all output of a child process, with a line of progress while it works. It never outlives us."""
    from rich.console import Console

    console = Console(stderr=True)
    log = folder.parent / f"{TEMPORARY}log-{uuid.uuid4().hex[:8]}"
    try:
        with log.open("w+b") as output:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                _watch(child, console, title, folder)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            output.seek(0)
            return child.returncode, output.read().decode("utf-8", "replace")
    finally:
        log.unlink(missing_ok=True)


def _watch(child: subprocess.Popen[bytes], console: Console, title: str, folder: Path) -> None:
    status = console.status(title) if console.is_terminal else None
    with status or nullcontext():
        if not status:
            console.print(title, highlight=False, soft_wrap=True)
        while True:
            try:
                child.wait(timeout=0.5 if status else 20)
                return
            except subprocess.TimeoutExpired:
                line = f"{title}: {_size(folder) / 1e6:,.0f} MB so far"
                status.update(line) if status else console.print(line, highlight=False, soft_wrap=True)


def _size(folder: Path) -> int:
    """Bytes below a folder in which another process works."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes `folder`; a full disk or a place that cannot be written becomes a FetchError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota exceeded
            raise no_space(folder) from None
        what = f"the cache {folder} cannot be written"
        raise FetchError("FET-006", what, error.strerror or str(error), "cache_dir=/a/writable/folder") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` for this process; a second one waits. The lock ends with the process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def no_space(folder: Path) -> FetchError:
    """The error of a full disk."""
    free = shutil.disk_usage(folder).free / 1e9
    what = f"the disk of {folder} is full ({free:.1f} GB free)"
    return FetchError(
        "FET-005", what, "a file that is only partly there is never used", "free some room, or cache_dir=/another/disk"
    )


def disk_full(text: str) -> bool:
    """Whether a child process ended because the disk was full."""
    return "No space left on device" in text or "Disk quota exceeded" in text


def last_line(text: str, pattern: re.Pattern[str] | None = None) -> str:
    """The last line that says something (and matches `pattern`), shortened: pip and tracebacks end with the reason."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    fitting = [line for line in lines if pattern is None or pattern.search(line)] or lines or ["it said nothing"]
    reason = re.search(r"\[Errno -?\d+\] ([^')]+)", fitting[-1])  # urllib3 wraps it in names of its classes
    return reason[1] if reason else fitting[-1].removeprefix("ERROR: ")[:300]
