"""A process that starts the same merge at many places, kills each at another point twice, and lets it end.

`python -m tests.merge_killed BASE ADAPTER FOLDER POINT...` prints a line of JSON per point: how many files each killed
merge had finished (there may be one), and the hashes of what it left in the end. Each merge is a fork, so that imports
are done once.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from finetune.merge import merge_folder
from finetune.rundir import RESUMED, read_json, sha256_tree


def main(base: Path, adapter: Path, folder: Path, points: list[int]) -> None:
    """One line per point."""
    torch.set_num_threads(1)
    for point in points:
        target, finished = folder / f"killed-{point}", []
        for left in (point, point // 2 + 2, 0):
            child = os.fork()
            if child == 0:
                merge_until(base, adapter, target, left)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if finished and status == 0:  # the last, or a second one that had less left to do than that
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            assert not target.exists()
            progress = target.with_name(RESUMED + target.name) / ".progress.json"
            finished.append(len(read_json(progress)["files"]) if progress.exists() else 0)
        print(json.dumps([finished, sha256_tree(target)]), flush=True)
        shutil.rmtree(target)


def merge_until(base: Path, adapter: Path, target: Path, left: int) -> None:
    """Merges, and dies at the `left`-th time that the process asks the system to write, size, rename or sync a file."""

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("pwrite", "fsync", "rename", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    merge_folder(base, adapter, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), [int(word) for word in sys.argv[4:]])
