"""The frozen base: `load_base` gives the model in 4 bits, its tokenizer and its family."""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import WeightsError
from finetune.families import Family, family_of

HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header, at most; the format's own limit."""

STRAY = re.compile(r"(language_model\.)?(model\.)?(language_model\.)?layers\.\d+\.")


@dataclass(slots=True)
class Base:
    """A loaded base model."""

    model: Any
    """The transformers model, frozen, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    family: Family
    """Its grammar."""
    folder: Path
    """Where its files are."""
    load_seconds: float
    """How long loading took."""
    load_peak_gib: float
    """Highest resident memory of the process while loading, in GiB."""
    resident_gib: float
    """Bytes of parameters and buffers, in GiB."""

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The context for a forward pass outside training.

        Families that keep some weights in fp32 beside bf16 ones need autocast there, as training has it.
        """
        import torch

        if self.family.mixed_dtypes and self.model.dtype == torch.bfloat16:
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return nullcontext()


def load_base(folder: Path, *, load_in_4bit: bool, precision: str) -> Base:
    """The model in `folder`, frozen: linear maps and expert stacks in NF4, or everything in `precision`.

    `precision` is `bf16` or `fp32`, the type of the arithmetic. Raises WeightsError when files are missing, damaged,
    or do not fit the config.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity

    disable_progress_bar()
    verbosity = get_verbosity()
    set_verbosity(logging.CRITICAL)  # transformers prints a report with tracebacks; what is wrong is said below
    from finetune.experts import EXPERTS, Nf4Config, prepare_experts

    started = time.monotonic()
    family, config = read_config(folder)
    check_shards(folder)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    nf4 = Nf4Config(family, compute_dtype=dtype)
    quantisation = {"quantization_config": nf4} if load_in_4bit else {}
    place = {"device_map": {"": "cuda"}} if torch.cuda.is_available() else {}
    try:
        with _Peak() as peak:
            model, info = _auto_class(family).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                experts_implementation=EXPERTS if family.experts else None,
                output_loading_info=True,
                **quantisation,
                **place,
            )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        why = nf4.wrong_shapes[0] if nf4.wrong_shapes else _first_line(error)
        raise WeightsError(
            "WGT-004", f"cannot load {folder}", why, "the files that belong to this config.json"
        ) from error
    finally:
        set_verbosity(verbosity)
    # A key that no layer of the text model has is a weight that would not be used; vision parts may stay unused.
    strays = [key for key in info["unexpected_keys"] if STRAY.match(key)]
    wrong = {"missing": info["missing_keys"], "mismatched": info["mismatched_keys"], "unexpected": strays}
    for what, keys in wrong.items():
        if keys:
            some = ", ".join(sorted(map(str, keys))[:3])
            raise WeightsError(
                "WGT-005",
                f"{folder}: {len(keys)} {what} keys, e.g. {some}",
                "the weights are not those that config.json describes",
                "fetch the folder again",
            )
    if not load_in_4bit:
        prepare_experts(model, family)
    _keep_cpu_layout(model)
    model.requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    seconds = time.monotonic() - started
    return Base(model, tokenizer, family, folder, seconds, peak.gib, resident / 2**30)


def read_config(folder: Path) -> tuple[Family, Any]:
    """(family, transformers config of the text model) of a checkpoint folder. Raises WeightsError."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            "WGT-001", f"{folder} has no config.json", "it is not a model folder", "model.source=/folder/of/the/model"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        family = family_of(values)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise WeightsError("WGT-002", f"{path} cannot be used", _first_line(error), "fetch the folder again") from error
    return family, config


def check_shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, each present and of the length its header says. Raises WeightsError WGT-003."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise WeightsError(
                "WGT-003", f"{folder}: {name} is missing", f"{index.name} names it", "fetch the folder again"
            )
        size = path.stat().st_size
        if expected_size(path) != size:
            raise WeightsError(
                "WGT-003", f"{path} is cut short or damaged", f"it has {size} bytes", "fetch this file again"
            )
    return [folder / name for name in names]


def expected_size(path: Path) -> int:
    """Bytes that a safetensors file must have by its own header; -1 when the header cannot be read."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= HEADER_LIMIT:
            return -1
        try:
            header = json.loads(handle.read(length))
            return 8 + length + max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return -1


def _auto_class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.auto_class)


def _keep_cpu_layout(model: Any) -> None:
    """On CPUs with AVX512-BF16 an evaluation repacks a Linear4bit weight for a kernel without autograd, and later
    training steps lose their input gradients (bitsandbytes 0.50.2, nn/modules.py). The switch is the layer's own.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


class _Peak:
    """Highest resident memory of this process inside the block, in GiB (sampled every 20 ms)."""

    def __enter__(self) -> _Peak:
        import threading

        self.gib, self._stop = resident_gib(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.gib = max(self.gib, resident_gib())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_gib() -> float:
    """Anonymous resident memory of this process in GiB: what it allocated, without files it merely maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
