"""Files of a merge side by side: one thread each, and no thread of torch's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MOST = 8
"""Lanes at most: beyond, disks are slower than the arithmetic."""


@contextmanager
def lanes() -> Iterator[ThreadPoolExecutor]:
    """Threads that write a file each, as many as the process may use.

    Each holds one matrix. Within them torch works in one thread: the pieces that are summed are so small that threads
    would wait for each other, and on a busy machine much longer than they work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(MOST, processors()), "merge") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
