"""Parts made by several processes, in order, resumable: a part that a killed process had finished is not made again."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

from finetune.data.part import Job, Made, Maker, Work
from finetune.errors import FinetuneError

ALONE = 4
"""So few blocks are done by the parent itself: starting a process takes longer."""

_MAKER: list[Maker | FinetuneError] = []
"""What a worker process works with, or why it cannot; one entry, made when it starts."""


def make_all(work: Work, jobs: Iterable[Job], workers: int) -> list[Made]:
    """The parts of all jobs, in their order. `workers` 0 means one per core. Raises what a worker raises."""
    jobs = iter(jobs)
    first = list(islice(jobs, ALONE + 1))
    progress = _Progress()
    if workers == 1 or len(first) <= ALONE:
        maker: list[Maker] = []
        made = []
        for job in chain(first, jobs):
            if not job.target.with_suffix(".facts").exists():
                maker = maker or [Maker(work)]
                maker[0].make(job)
            made.append(progress.count(finished(job.target)))
        return made
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (work, os.getpid())) as pool:
        try:
            return [progress.count(made) for made in _stream(pool, chain(first, jobs), 2 * workers)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def finished(target: Path) -> Made:
    """What is known of a part that exists."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(target.with_suffix(".facts"))
    told = json.loads(metadata.metadata[b"finetune"])
    return Made(target=target, file=told["file"], facts=metadata.num_rows, ignored=told["ignored"])


def _stream(pool: ProcessPoolExecutor, jobs: Iterable[Job], most: int) -> Iterator[Made]:
    """Parts in order; never more than `most` blocks are held at once."""
    waiting: deque[tuple[Path, Future[None] | None]] = deque()
    for job in jobs:
        there = job.target.with_suffix(".facts").exists()
        waiting.append((job.target, None if there else pool.submit(_make, job)))
        while len(waiting) >= most:
            yield _next(waiting)
    while waiting:
        yield _next(waiting)


def _next(waiting: deque[tuple[Path, Future[None] | None]]) -> Made:
    target, future = waiting.popleft()
    if future is not None:
        future.result()
    return finished(target)


def _start(work: Work, parent: int) -> None:
    """Runs first in a worker: one thread, no answer to Ctrl-C (the parent has one), an end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        _MAKER.append(Maker(work))
    except FinetuneError as error:  # raised here it would only break the pool; `_make` says it
        _MAKER.append(error)
    gc.freeze()  # what is there now stays: collecting need not look at it again and again


def _make(job: Job) -> None:
    if isinstance(_MAKER[0], FinetuneError):
        raise _MAKER[0]
    _MAKER[0].make(job)


class _Progress:
    """Says now and then how far it is."""

    def __init__(self) -> None:
        self.rows, self.started, self.said = 0, time.monotonic(), time.monotonic()

    def count(self, made: Made) -> Made:
        """Takes note of a part."""
        self.rows += made.facts
        now = time.monotonic()
        if now - self.said >= 5:
            self.said = now
            rate = self.rows / (now - self.started)
            print(f"prepared {self.rows:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)
        return made
