"""A merge that can be killed: finished files are noted with their hashes, and the same merge goes on with them.

The folder `.merging-NAME` beside the target holds finished files under their names, unfinished ones under temporary
names, and `.progress.json`, which says what the merge is of. Another adapter, base or setting begins anew; a finished
file that is not what was noted is written again. Whoever works in the folder holds a lock on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, RunError
from finetune.merge.plan import How
from finetune.merge.sums import Tally
from finetune.rundir import RESUMED, TEMPORARY, fsync, publish, read_json, sha256_file, write_json
from finetune.shards import check_shards

PROGRESS = ".progress.json"
"""The file that says what is finished."""

WAITING = 4
"""Files that may be written and not yet on the disk."""


def identity(base: Path, adapter: Path, how: How) -> dict[str, Any]:
    """What a merge is of: hashes of the adapter; of the base the config, and size, time and header of each file.

    A file of the base that was written again begins the merge anew even where its bytes are the same.
    """
    files = {}
    for path in check_shards(base):
        with path.open("rb") as handle:
            header = handle.read(int.from_bytes(handle.read(8), "little"))
        stat = path.stat()
        files[path.name] = [stat.st_size, stat.st_mtime_ns, hashlib.sha256(header).hexdigest()]
    return {
        "schema": 1,
        "adapter": {path.name: sha256_file(path) for path in sorted(adapter.glob("*")) if path.is_file()},
        "base": str(base.resolve()),
        "config": sha256_file(base / "config.json"),
        "files": files,
        "how": json.loads(json.dumps(asdict(how))),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


@dataclass(slots=True)
class Staging:
    """The folder of a merge on its way."""

    folder: Path
    """The folder."""
    identity: dict[str, Any]
    """What the merge is of."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Finished file -> its size, hash and sums."""
    damaged: list[str] = field(default_factory=list)
    """Files that were noted as finished and are not what was noted."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `files` and what is noted of them, while several are being finished."""

    def begin(self) -> None:
        """Takes up what is finished and whole; removes everything else."""
        try:
            noted = read_json(self.folder / PROGRESS)
            files = noted["files"] if noted["identity"] == self.identity else {}
        except (OSError, ValueError, KeyError, TypeError):
            files = {}
        for name, entry in files.items():
            path = self.folder / name
            whole = path.is_file() and path.stat().st_size == entry["bytes"]
            if whole and sha256_file(path) == entry["sha256"]:
                self.files[name] = entry
            else:
                self.damaged.append(name)
        for path in self.folder.iterdir():
            if path.name not in (*self.files, PROGRESS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._note()

    def partial(self, name: str) -> Path:
        """Where a file is written before it is finished."""
        return self.folder / f"{TEMPORARY}{name}"

    def finish(self, name: str, tally: Tally, sha256: str) -> None:
        """Makes the disk hold a file, gives it its name and notes it."""
        path = self.partial(name)
        entry = {"bytes": path.stat().st_size, "sha256": sha256, "sums": asdict(tally)}
        fsync(path)
        with self.lock:
            path.rename(self.folder / name)
            self.files[name] = entry
            self._note()

    def tally(self) -> Tally:
        """The sums over all finished files, added up by name."""
        total = Tally()
        for _, entry in sorted(self.files.items()):
            total.add(Tally(**entry["sums"]))
        return total

    def _note(self) -> None:
        write_json(self.folder / PROGRESS, {"identity": self.identity, "files": self.files})


@contextmanager
def staging(target: Path, what: dict[str, Any]) -> Iterator[Staging]:
    """The staging folder of `target`, which becomes `target` when the block ends well.

    It is removed when the block ends with an error that would come again (weights, adapter, gates), and kept for the
    next time when the block is interrupted in another way. Raises RunError RUN-003 when another process merges into the
    same target.
    """
    folder = target.with_name(RESUMED + target.name)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why, how = "another process merges into it", "wait for it"
            raise RunError("RUN-003", f"{target} is in use", why, how) from None
        found = Staging(folder, what)
        found.begin()
        try:
            yield found
        except RunError:
            raise
        except FinetuneError:
            shutil.rmtree(folder)
            raise
        publish(folder, target)
        (target / PROGRESS).unlink()  # not before: a merge killed in between would begin anew
    finally:
        os.close(handle)


def require_room(folder: Path, need: int) -> None:
    """Raises RunError DSK-002 when `need` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < need:
        what = f"merging needs {need / 2**30:.1f} GiB in {folder.parent}, {free / 2**30:.1f} GiB are free"
        raise RunError("DSK-002", what, "finished files are kept until then", "runs_dir=/larger/disk")


class Finisher:
    """Makes the disk hold files in threads of its own, while further ones are written.

    At most WAITING files are written and not finished: they would be written again by a merge that was killed.
    """

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._threads = ThreadPoolExecutor(2, "finish")
        self._room = threading.BoundedSemaphore(WAITING)
        self._begun: list[Future[None]] = []

    def __enter__(self) -> Finisher:
        return self

    def finish(self, name: str, tally: Tally, sha256: str) -> None:
        """Begins with a file, and waits while too many are begun. Raises what an earlier one raised. Any thread."""
        self._room.acquire()
        future = self._threads.submit(self.staging.finish, name, tally, sha256)
        future.add_done_callback(lambda _: self._room.release())
        self._begun.append(future)
        for begun in self._begun:
            if begun.done():
                begun.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=True)
        if kind is None:
            for future in self._begun:
                future.result()
