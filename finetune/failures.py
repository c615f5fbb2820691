"""An exception becomes a sentence on stderr and an exit code: `explain(error, run_dir)`. Nobody is shown a traceback."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from finetune import guard
from finetune.errors import FinetuneError
from finetune.rundir import RunDir

INTERRUPTED, BROKEN_PIPE, UNEXPECTED, RUNTIME = 130, 141, 1, 3
DISTRIBUTIONS = {"hydra": "hydra-core", "yaml": "PyYAML", "sklearn": "scikit-learn", "PIL": "pillow"}
"""Import name -> name to install, where they differ."""
LOG = "error.log"
"""File in the run folder that tracebacks are added to."""


def explain(error: BaseException, run_dir: RunDir | None) -> int:
    """The exit code for an exception, after a short sentence on stderr. `run_dir` is the run it happened in, if any."""
    again = f" To continue: python -m finetune run={run_dir.path}" if run_dir else ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else UNEXPECTED
    if isinstance(error, FinetuneError):
        return _say(error.sentence(), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _say(f"Stopped. Finished stages are kept, nothing half-written is used.{again}", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return BROKEN_PIPE
    causes = list(_causes(error))
    if any(_disk_full(cause) for cause in causes):
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return _say(f"DSK-002 the disk is full{where}. Nothing half-written is used. Free some room.{again}", RUNTIME)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = os.strerror(cause.errno).lower()
            return _say(
                f"RUN-007 {cause.filename}: {reason}. Change its rights, or give other folders with runs_dir= and cache_dir=",
                RUNTIME,
            )
        if isinstance(cause, ModuleNotFoundError) and cause.name and not cause.name.startswith("finetune"):
            module = cause.name.partition(".")[0]
            name = DISTRIBUTIONS[module] if module in DISTRIBUTIONS else module
            return _say(
                f"DEP-001 the package {name} is missing. Type: {Path(sys.executable).name} -m pip install {name}",
                RUNTIME,
            )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return _say(
                f"MEM-001 out of memory. `python -m finetune plan` shows what a recipe needs and the smallest change.{again}",
                RUNTIME,
            )
    first = (str(error).strip().splitlines() or ["no message"])[0]
    first = guard.SECRET_VALUE.sub("[hidden]", first)
    return _say(
        f"BUG-001 unexpected {type(error).__name__}: {first}. This is a defect of finetune; details: {_log(error, run_dir)}.{again}",
        UNEXPECTED,
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _disk_full(error: BaseException) -> bool:
    """Also where a library gives the system's message without its number, as safetensors does."""
    return (
        isinstance(error, OSError)
        and error.errno in (errno.ENOSPC, errno.EDQUOT)
        or "No space left on device" in str(error)
    )


def _log(error: BaseException, run_dir: RunDir | None) -> Path:
    """The file that the traceback was added to, with secrets hidden."""
    text = guard.SECRET_VALUE.sub("[hidden]", "".join(traceback.format_exception(error)))
    if run_dir is not None:
        try:
            with (run_dir.path / LOG).open("a", encoding="utf-8") as handle:
                handle.write(text)
            return run_dir.path / LOG
        except OSError:
            pass  # the folder may be why it failed; the temporary folder is tried next
    with tempfile.NamedTemporaryFile("w", prefix="finetune-", suffix=".log", delete=False, encoding="utf-8") as handle:
        handle.write(text)
    return Path(handle.name)


def _say(sentences: str, code: int) -> int:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for sentence in sentences.splitlines():
        print(f"{red}{sentence}{plain}", file=sys.stderr, flush=True)
    return code


def _close_stdout() -> None:
    """Whoever read our output has gone; the interpreter must not try to write the rest to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
