"""An exception becomes a sentence on stderr and an exit code: `explain(error, run_dir)`. Nobody sees a traceback."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from finetune import guard
from finetune.errors import FinetuneError, Preempted
from finetune.rundir import RunDir

INTERRUPTED, BROKEN_PIPE, UNEXPECTED, RUNTIME = 130, 141, 1, 3
DISTRIBUTIONS = {"hydra": "hydra-core", "yaml": "PyYAML", "sklearn": "scikit-learn", "PIL": "pillow"}
"""Import name -> name to install, where they differ."""
LOG = "error.log"
"""File in the run folder that tracebacks are added to."""


def quiet_threads() -> None:
    """From now on a library's thread that fails says so in a line, without a traceback (a logger on a full disk)."""

    def say(args: threading.ExceptHookArgs) -> None:
        what = "" if args.exc_value is None else f": {args.exc_value}"
        print(
            guard.redact(f"a background thread ended early, {args.exc_type.__name__}{what}"),
            file=sys.stderr,
            flush=True,
        )

    threading.excepthook = say


def explain(error: BaseException, run_dir: RunDir | None) -> int:
    """The exit code for an exception, after a short sentence on stderr. `run_dir` is the run it happened in, if any."""
    again = f" To continue: python -m finetune run={run_dir.path}" if run_dir else ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else UNEXPECTED
    if isinstance(error, Preempted):
        return _say(error.sentence() + again, error.exit_code)
    if isinstance(error, FinetuneError):
        return _say(error.sentence(), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _say(f"Stopped. Finished stages are kept, nothing half-written is used.{again}", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return BROKEN_PIPE
    causes = list(_causes(error))
    if any(_disk_full(cause) for cause in causes):
        return _say(f"DSK-002 the disk is full. Nothing half-written is used. Free some room.{again}", RUNTIME)
    for cause in causes:
        if known := _known(cause):
            return _say(known + again, RUNTIME)
    what = f"BUG-001 unexpected {type(error).__name__}: {_first_line(error)}. This is a defect of finetune"
    return _say(f"{what} (details: {_log(error, run_dir)}).{again}", UNEXPECTED)


def _known(error: BaseException) -> str:
    """The sentence about an error that the user can mend, or an empty text."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(error.errno).lower()
        return f"RUN-007 {error.filename}: {reason}. Change its rights, or give another runs_dir= or cache_dir=."
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "finetune":
        module = error.name.partition(".")[0]
        name = DISTRIBUTIONS[module] if module in DISTRIBUTIONS else module
        return f"DEP-001 the package {name} is missing. Type: {sys.executable} -m pip install {name}"
    if (tracker := type(error).__module__.partition(".")[0]) in ("wandb", "mlflow", "trackio"):
        return (
            f"TRK-004 the tracker {tracker} failed: {_first_line(error)}. Mend its variables, or leave it out of "
            "train.report_to in a new run."
        )
    if out_of_memory(error):
        return "MEM-001 out of memory. `python -m finetune plan` shows what is needed and the smallest change."
    return ""


def _first_line(error: BaseException) -> str:
    """The first line of a message, without secrets and its full stop."""
    first = guard.redact((str(error).strip().splitlines() or ["no message"])[0])
    return first.rstrip(".")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in Python, or in torch's allocator for the host, which has no type for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or "No space left on device" in str(error)


def _log(error: BaseException, run_dir: RunDir | None) -> Path:
    """The file that the traceback was added to, with secrets hidden."""
    text = guard.redact("".join(traceback.format_exception(error)))
    if run_dir is not None:
        try:
            with (run_dir.path / LOG).open("a", encoding="utf-8") as handle:
                handle.write(text)
            return run_dir.path / LOG
        except OSError:
            pass  # the folder may be why it failed; the temporary folder is tried next
    number, name = tempfile.mkstemp(prefix="finetune-", suffix=".log")
    with open(number, "w", encoding="utf-8") as handle:  # noqa: PTH123  # a descriptor, not a path
        handle.write(text)
    return Path(name)


def _say(sentences: str, code: int) -> int:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    for sentence in guard.redact(sentences).splitlines():
        print(f"{red}{sentence}{plain}", file=sys.stderr, flush=True)
    return code


def _close_stdout() -> None:
    """Whoever read our output has gone; the interpreter must not try to write the rest to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
