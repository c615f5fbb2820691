"""The NVIDIA GPUs of this machine and their memory, by their driver's own program: `gpus()`. No torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.figure import Figure, measured

SECONDS = 10.0
"""How long the program may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    """Its product name."""
    total_gib: float
    """Its memory."""
    free_gib: float
    """What of it nobody uses now."""


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi shows; none where there is no such program, or it fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    words = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return read(done.stdout)


def read(text: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's lines of `name, MiB, MiB`; a line that is no such thing is passed over."""
    found = []
    for line in text.splitlines():
        name, *sizes = (word.strip() for word in line.rsplit(",", 2))
        if len(sizes) == 2 and all(size.isdigit() for size in sizes):
            total, free = (int(size) / 1024 for size in sizes)
            found.append(Gpu(name=name, total_gib=total, free_gib=free))
    return found


def compared(found: Sequence[Gpu], need_gib: float) -> tuple[Figure, ...]:
    """A measured figure per GPU that says whether the plan fits into what is free of it."""
    return tuple(
        measured(
            f"GPU {number}",
            gpu.total_gib,
            "GiB",
            f"{gpu.name}, {gpu.free_gib:,.1f} GiB free: the plan's {need_gib:,.1f} GiB "
            + ("fit" if need_gib <= gpu.free_gib else "do not fit"),
        )
        for number, gpu in enumerate(found)
    )
