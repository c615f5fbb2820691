"""Blocks of records become parts by `datasets`, slice by slice: it reads them, maps them and keeps what came of them.

A slice is some tens of blocks per process. `Dataset.from_generator` writes its raw blocks into an Arrow file, a row
each, before anything has guessed a type; `Dataset.map` makes the parts of these, in several processes; its cache files
stay until the whole set is done, and are what a killed run goes on from. They are found by their place in the input and
the set's address: `datasets` hashes no function. A note beside them, written last, has their sha256: Arrow files have
no checksums, and one that a broken disk or a power cut has damaged is made again, never read.

Ours beside it: the processes are forks (on Linux), which end with their parent and leave Ctrl-C to it, and an error in
one comes out as it was raised.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.files import BLOCK_ROWS, Block
from finetune.data.part import Job, Maker, Work, part_schema
from finetune.errors import DataError
from finetune.rundir import read_json, sha256_file, write_json

if TYPE_CHECKING:
    from datasets import Dataset

ALONE = 4
"""So few blocks are done by the parent itself: starting processes takes longer."""

PER_PROCESS = 16
"""Blocks of a slice for each process: what a killed run loses at most."""

LONGEST = 60
"""Bytes of the path of a temporary folder in which a socket can have a name: Linux allows it 107 in all."""

BLOCK = tuple(field.name for field in fields(Block))

_READY: list[tuple[Work, Maker]] = []
"""What this process makes parts with, kept for the next block; forks of it have it from the start."""

_PARENT: list[int] = []
"""The process whose forks map blocks, while it maps; empty else."""


def mapped(work: Work, jobs: Iterable[Job], parts: Path, key: str, workers: int) -> Dataset:
    """The parts of all jobs, in their order: a dataset on disk with the columns of `part_schema`, a row per record.

    `parts` is a folder for cache files, which another run with the same `key` and jobs goes on from; nothing is written
    elsewhere. `workers` 0 means one process per core. Raises what reading or making a part raises; DataError DATA-006
    where there are no rows, DATA-030 where a process was killed.
    """
    from datasets import Dataset, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    jobs = iter(jobs)
    first = list(islice(jobs, ALONE + 1))
    workers = 1 if len(first) <= ALONE else workers or len(os.sched_getaffinity(0))
    stream = chain(first, jobs)
    progress, files, place = _Progress(), [], 0
    try:
        while True:
            name = f"{place + 1:06d}"
            noted = _whole(parts, name)
            if noted:
                deque(islice(stream, noted["blocks"]), maxlen=0)
            elif job := next(stream, None):
                some = chain([job], islice(stream, PER_PROCESS * workers - 1))
                noted = _make(work, some, parts, name, f"{key}-{name}", workers)
            else:
                break
            files += noted["files"]
            progress.count(noted["rows"])
            place += noted["blocks"]
    finally:
        _READY[:] = [ready for ready in _READY if ready[0] != work]
    if not progress.rows:
        raise DataError("DATA-006", "the files have no rows", "", "files with rows")
    return concatenate_datasets([Dataset.from_file(str(parts / file)) for file in files])


class Making:
    """What `Dataset.map` calls with a raw block, a table of one row; a table of its part comes back."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, raw: Any) -> Any:
        """The part of a block."""
        (row,) = raw.to_pylist()
        block = Block(**{name: row.pop(name) for name in BLOCK})
        return self.maker().make(Job(block=block, **row))

    def maker(self) -> Maker:
        """What makes parts, loaded once in a process. Raises DataError where the tokenizer cannot be used."""
        for work, maker in _READY:
            if work == self.work:
                return maker
        _READY.append((self.work, Maker(self.work)))
        return _READY[-1][1]


def _whole(parts: Path, name: str) -> dict[str, Any]:
    """The note of a slice whose cache files are as they were written; else none, and no file of it is left."""
    note = parts / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # the note itself is damaged, or a file
        noted: dict[str, Any] = read_json(note)
        if noted["blocks"] > 0 and all(sha256_file(parts / file) == sha for file, sha in noted["files"].items()):
            return noted
    for path in parts.glob(f"{name}*"):  # also what a killed process had finished of it: nobody noted what it was
        path.unlink()
    return {}


def _make(work: Work, jobs: Iterator[Job], parts: Path, name: str, key: str, workers: int) -> dict[str, Any]:
    """Reads and maps a slice; the note about its files."""
    from datasets import Features

    reading = parts / "reading"
    shutil.rmtree(reading, ignore_errors=True)  # of a run that was killed
    raw = _read(jobs, reading, key).with_format("arrow")
    processes = min(workers, len(raw)) if workers > 1 else None
    making, fresh = Making(work), not any(ready[0] == work for ready in _READY)
    maker = making.maker()  # here, so that forks have it and what is wrong with it is said at once
    with _processes(processes):
        if fresh and processes:
            maker.load()
        made = raw.map(
            making,
            batched=True,
            batch_size=1,
            writer_batch_size=BLOCK_ROWS,
            remove_columns=raw.column_names,
            features=Features.from_arrow_schema(part_schema(near=work.near)),
            num_proc=processes,
            cache_file_name=str(parts / f"{name}.arrow"),
            new_fingerprint=key,
        )
    files = {Path(file["filename"]).name: sha256_file(Path(file["filename"])) for file in made.cache_files}
    noted = {"blocks": len(raw), "rows": len(made), "files": files}
    write_json(parts / f"{name}.json", noted)
    shutil.rmtree(reading, ignore_errors=True)
    return noted


def _read(jobs: Iterator[Job], folder: Path, key: str) -> Dataset:
    """Blocks as the rows of a dataset, one in memory at a time. Raises what cutting the files raises."""
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    texts = {name: Value("string") for name in ("file", "kind", "format", "side", "prefix")}
    lists = {"lines": List(Value("int64")), "nth": List(Value("int64")), "records": List(Value("large_binary"))}
    lists |= {"header": List(Value("string")), "usual": List(Value("string"))}

    def rows() -> Iterator[dict[str, Any]]:
        for job in jobs:
            block = {name: getattr(job.block, name) for name in BLOCK}
            yield block | {name: getattr(job, name) for name in ("format", "side", "prefix", "usual")}

    try:
        return Dataset.from_generator(
            rows, features=Features(texts | lists), cache_dir=str(folder), fingerprint=key, writer_batch_size=1
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


@contextmanager
def _processes(count: int | None) -> Iterator[None]:
    """While `Dataset.map` works: what its processes need, and its errors as they were raised."""
    import multiprocess

    if count is None:
        yield
        return
    environment, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread of the parent's is none in a fork
    folder = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
        tempfile.tempdir = "/tmp"  # for a socket, which none of the rows goes through
    method = multiprocess.get_start_method(allow_none=True)
    if sys.platform == "linux":
        multiprocess.set_start_method("fork", force=True)
    _PARENT.append(os.getpid())
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()  # what is there now stays: collecting need not look at it, and touch its pages, in every process
    try:
        yield
    except multiprocess.TimeoutError as error:  # while it stopped for another error, a process was still at work
        raise (error.__context__ or error) from None
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        why = "the system does that where memory runs out"
        raise DataError("DATA-030", "a process that prepared rows was killed", why, "data.workers=1") from None
    finally:
        if not frozen:
            gc.unfreeze()
        _PARENT.clear()
        multiprocess.set_start_method(method, force=True)
        tempfile.tempdir = folder
        os.environ = environment  # noqa: B003  # datasets 4.8.5 leaves a copy in its place
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin() -> None:
    """Runs first in a fork of a process that maps: no answer to Ctrl-C, none of the parent's to an end, one with it."""
    if not _PARENT:
        return
    parent = _PARENT[0]
    _PARENT.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


os.register_at_fork(after_in_child=_begin)


class _Progress:
    """Says now and then how far it is."""

    def __init__(self) -> None:
        self.rows, self.started, self.said = 0, time.monotonic(), time.monotonic()

    def count(self, rows: int) -> None:
        """Takes note of a slice."""
        self.rows += rows
        now = time.monotonic()
        if now - self.said >= 5:
            self.said = now
            rate = self.rows / (now - self.started)
            print(f"prepared {self.rows:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)
