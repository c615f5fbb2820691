"""The processes of one training, and what they agree on over the CPU: `Ranks.here()`.

A process that failed, or that was asked to stop, tells the others at the next agreement: none of them waits for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune.errors import FinetuneError, RunError

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts of something that is split as FSDP2 splits it: in equal pieces, the last shorter."""

    number: int
    """From 0."""
    of: int
    """How many parts there are."""

    def indices(self, size: int) -> range:
        """Which of `size` indices this part has."""
        piece = -(-size // self.of)
        return range(min(self.number * piece, size), min((self.number + 1) * piece, size))


@dataclass(slots=True)
class Ranks:
    """This process among `world`; every method but `first` is called by all of them at the same point."""

    rank: int = 0
    """Number of this process, from 0."""
    world: int = 1
    """How many there are."""
    group: Any = None
    """A gloo process group: agreements go over the CPU and never wait for a GPU."""
    sharing: int = 1
    """How many neighbours hold a part each of the same rows; `world` is a multiple of it."""

    @classmethod
    def here(cls, sharing: int = 1) -> Ranks:
        """This process by the environment (`RANK`, `WORLD_SIZE`), with a group of its own once torch has one."""
        rank, world = expected()
        if world == 1:
            return cls()
        import torch.distributed as dist

        return cls(rank, world, dist.new_group(backend="gloo"), sharing)

    @property
    def readers(self) -> int:
        """How many batches are read at once: one by each process, or by each group that shares its rows."""
        return self.world // self.sharing

    @property
    def reader(self) -> int:
        """Which of those batches is this process', from 0."""
        return self.rank // self.sharing

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank. It must be what JSON can hold: nothing is pickled."""
        if self.world == 1:
            return [value]
        import torch
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([text.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())), group=self.group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def share(self, value: Any) -> Any:
        """The value of the first process."""
        return self.gather(value if self.first else None)[0]

    @contextmanager
    def one_for_all(self) -> Iterator[None]:
        """All processes carry out the block, or all raise: what one of them raises in it is raised in every one."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
        self.agree(error)

    def in_turn(self, work: Callable[[], Made]) -> Made:
        """What `work` gives in this process. The first one does it before the others; what one raises, all raise."""
        with self.one_for_all():
            made = [work()] if self.first else []
        with self.one_for_all():
            return made[0] if self.first else work()

    def agree(self, error: BaseException | None = None) -> None:
        """Nothing when all are well. Raises this process' own error, or else the first error of another one."""
        said = self.gather(None if error is None else _texts(error))
        if error is not None:
            raise error
        for texts in said:
            if texts is not None:
                raise RunError(*texts)


def _texts(error: BaseException) -> list[str]:
    """Code, what, why and fix of an error, for another process to raise it."""
    if isinstance(error, FinetuneError) and hasattr(error, "code"):
        return [error.code, error.what, error.why, error.fix]
    return ["RNK-001", f"another process failed with {type(error).__name__}: {error}", "", ""]


def expected() -> tuple[int, int]:
    """(rank, world) of the environment that a launcher sets; (0, 1) without one."""
    names = os.environ
    return (int(names["RANK"]), int(names["WORLD_SIZE"])) if "RANK" in names and "WORLD_SIZE" in names else (0, 1)
