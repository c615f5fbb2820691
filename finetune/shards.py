"""A checkpoint folder on disk: its weight files, and every weight of them in plain numbers, read piece by piece.

A folder in fp8 or fp4 reads like its unquantised twin: each scale is folded into the weight it belongs to, used once,
and has no key of its own any more. A scale without a weight, or an 8-bit weight without a scale, is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import WeightsError
from finetune.foreign.headers import HeaderError, read_header, read_index

METHODS = ("fp8", "mxfp4")
"""Values of quant_method in config.json whose files are read."""

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes per value of safetensors' types; all others have one."""

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
PACKED_TYPES = ("I8", "U8", "F4")
ACTIVATION_SCALE = re.compile(r"(activation_scale|input_scale|qscale_act)$")
"""Scales for arithmetic in fp8. Ours is bf16 or fp32, so they have no use here."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor is."""

    file: Path
    """The safetensors file."""
    dtype: str
    """Its type there, in safetensors' words."""
    shape: tuple[int, ...]
    """Its shape there."""
    offset: int
    """Where its bytes begin in the file."""

    @property
    def bytes(self) -> int:
        """Its size there."""
        size = BYTES[self.dtype] if self.dtype in BYTES else 1
        for length in self.shape:
            size *= length
        return size


def check_shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, each present and as its header says. Raises WeightsError WGT-003."""
    return list(_headers(folder))


def _fits(value: dict[str, Any]) -> bool:
    """Whether a header's entry of a tensor has a type, a shape and two offsets."""
    numbers = [*value["shape"], *value["data_offsets"]]
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return whole and type(value["dtype"]) is str and len(value["data_offsets"]) == 2


def read_headers(folder: Path) -> dict[str, Entry]:
    """Key -> where its tensor is, for every tensor of a checkpoint. Raises WeightsError (WGT-003)."""
    entries: dict[str, Entry] = {}
    for file, (begin, header) in _headers(folder).items():
        for key, value in header.items():
            if key in entries:
                what = f"{file} has {key}, which {entries[key].file.name} has too"
                raise WeightsError("WGT-003", what, "nobody knows which one counts", "fetch the folder again")
            entries[key] = Entry(file, value["dtype"], tuple(value["shape"]), begin + value["data_offsets"][0])
    return entries


def _headers(folder: Path) -> dict[Path, tuple[int, dict[str, Any]]]:
    """Weight file -> (where its data begin, its header), each believed. Raises WeightsError WGT-003."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(read_index(index).values()))
        except (HeaderError, OSError) as error:
            raise WeightsError("WGT-003", f"{index} cannot be used", str(error), "fetch this file again") from None
    found = {}
    for name in names:
        path = folder / name
        if not os.path.isfile(path):  # noqa: PTH113  # false for names no file system takes
            raise WeightsError(
                "WGT-003", f"{folder}: {name} is missing", f"{index.name} names it", "fetch the folder again"
            )
        try:
            found[path] = read_header(path)
        except (HeaderError, OSError) as error:
            what = f"{path} is cut short or damaged"
            raise WeightsError("WGT-003", what, str(error), "fetch this file again") from None
    return found


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, or {}. Raises WeightsError (WGT-007) for other methods."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    for part in (config, text):
        settings = part.get("quantization_config")
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method not in METHODS:
            raise WeightsError(
                "WGT-007",
                f"config.json says quant_method={method!r}",
                f"weights in bf16, fp16, fp32 and of the methods {', '.join(METHODS)} are read",
                "the unquantised files of this model",
            )
        return dict(settings)
    return {}


class Weight:
    """One weight of a checkpoint in plain numbers, not read yet.

    `weight[...]` reads all of it, `weight[e]` one matrix of a stack; fp8 and fp4 come out in fp32. transformers' loader
    takes it for a slice of a safetensors file. A `deferred` one stays unread there: what packs it reads it in parts.
    """

    def __init__(self, key: str, read: Any, shape: tuple[int, ...], entries: tuple[Entry, ...]) -> None:
        self.key, self.shape, self.entries = key, shape, entries
        self.deferred = False
        self.device: Any = None
        self.dtype: Any = None
        self._read = read

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis and self.deferred:
            return self
        return self.read(None if index is Ellipsis else index)

    def to(self, device: Any = None, dtype: Any = None) -> Weight:
        """The same weight, to be read onto `device` as `dtype`."""
        twin = Weight(self.key, self._read, self.shape, self.entries)
        twin.deferred, twin.device, twin.dtype = self.deferred, device, dtype
        return twin

    def read(self, expert: int | None = None) -> Any:
        """The tensor, or one matrix of it."""
        tensor = self._read(expert)
        return tensor if self.device is None and self.dtype is None else tensor.to(self.device, self.dtype)

    @property
    def is_quantised(self) -> bool:
        """Whether it is stored in fp8 or fp4, with a scale."""
        return len(self.entries) > 1

    @property
    def bytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(entry.bytes for entry in self.entries)


def weights_of(folder: Path, quantisation: Mapping[str, Any], *, mapped: bool = True) -> dict[str, Weight]:
    """Key -> weight of a checkpoint folder, as in its unquantised twin.

    `quantisation` is what `quantisation_of` found in its config. `mapped` weights stay on disk until they are used, and
    can be dropped from memory again; others are read into memory, and no more of a file than was asked for. Raises
    WeightsError: WGT-003 for damaged files, WGT-006 for weights without a scale and scales without a weight.
    """
    return _Pairing(folder, read_headers(folder), _block(quantisation), _Files(mapped)).weights()


def _block(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    size = quantisation.get("weight_block_size")
    if not size:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        what = f"config.json says weight_block_size={size!r:.60}"
        raise WeightsError("WGT-007", what, "it is rows and columns of a block, [128, 128]", "fetch this file again")
    return size[0], size[1]


@dataclass
class _Pairing:
    """Finds for each quantised weight its scale."""

    folder: Path
    entries: dict[str, Entry]
    block: tuple[int, int] | None
    files: _Files

    def weights(self) -> dict[str, Weight]:
        files = self.files
        made: dict[str, Weight] = {}
        scales: set[str] = set()
        for key, entry in self.entries.items():
            if key.endswith("_blocks") and entry.dtype == "U8":
                name, scale = key.removesuffix("_blocks"), key.removesuffix("_blocks") + "_scales"
                self._require(key, scale)
                scales |= {key, scale}
                made[name] = self._mxfp4(name, key, scale)
                continue
            scale = self._scale_of(key)
            if entry.dtype in FP8_TYPES or (entry.dtype in PACKED_TYPES and scale):
                self._require(key, scale)
                scales.add(scale)
                made[key] = self._scaled(key, scale)
        for key, entry in self.entries.items():
            if key in made or key in scales:
                continue
            if ACTIVATION_SCALE.search(key):
                continue
            if re.search(r"(_scale_inv|_scales|\.weight_scale|_blocks)$", key):
                self._refuse(f"{key} is a scale of no weight")
            if entry.dtype in PACKED_TYPES:
                self._refuse(f"{key} is stored as {entry.dtype} without a scale")
            made[key] = Weight(key, files.reader(key, entry), entry.shape, (entry,))
        return made

    def _scale_of(self, key: str) -> str:
        stem = key.removesuffix(".weight")
        names = [f"{key}_scale_inv", f"{key}_scale"] + ([f"{stem}.scale"] if stem != key else [])
        return next((name for name in names if name in self.entries), "")

    def _require(self, key: str, scale: str) -> None:
        if scale not in self.entries:
            self._refuse(f"{key} is stored as {self.entries[key].dtype} and has no scale")

    def _refuse(self, what: str) -> None:
        raise WeightsError(
            "WGT-006", f"{self.folder}: {what}", "without it the numbers are not known", "fetch the folder again"
        )

    def _scaled(self, key: str, scale_key: str) -> Weight:
        from finetune.formats import scaled, unpack_e2m1

        entry, scale_entry = self.entries[key], self.entries[scale_key]
        packed = entry.dtype in PACKED_TYPES
        shape = (*entry.shape[:-1], entry.shape[-1] * (2 if packed else 1))
        values, scales = self.files.reader(key, entry), self.files.reader(scale_key, scale_entry)
        per_matrix = len(entry.shape) == 3 and scale_entry.shape[:1] == entry.shape[:1] and len(scale_entry.shape) == 3
        if len(entry.shape) == 3 and not per_matrix and scale_entry.shape not in ((), (1,)):
            self._refuse(f"{scale_key} {scale_entry.shape} does not fit {key} {entry.shape}")

        def matrix(expert: int | None) -> Any:
            part = scales(expert if per_matrix else None)
            found = values(expert)
            try:
                return scaled(unpack_e2m1(found) if packed else found, part, None if packed else self.block)
            except ValueError as error:
                raise WeightsError(
                    "WGT-006", f"{scale_key} does not fit {key}", str(error), "fetch the folder again"
                ) from error

        def read(expert: int | None) -> Any:
            import torch

            if expert is None and len(shape) == 3:
                return torch.stack([matrix(e) for e in range(shape[0])])
            return matrix(expert)

        return Weight(key, read, shape, (entry, scale_entry))

    def _mxfp4(self, name: str, blocks_key: str, scales_key: str) -> Weight:
        from finetune.formats import mxfp4

        blocks, scales = self.entries[blocks_key], self.entries[scales_key]
        if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
            self._refuse(f"{scales_key} {scales.shape} does not fit {blocks_key} {blocks.shape}")
        experts, rows, groups, length = blocks.shape
        read_blocks = self.files.reader(blocks_key, blocks)
        read_scales = self.files.reader(scales_key, scales)

        def read(expert: int | None) -> Any:
            import torch

            if expert is None:
                return torch.stack([read(e) for e in range(experts)])
            # Published by output row; the class that runs them has (E, in, out).
            return mxfp4(read_blocks(expert), read_scales(expert)).T.contiguous()

        return Weight(name, read, (experts, groups * length * 2, rows), (blocks, scales))


class _Files:
    """Open safetensors files, each opened once."""

    def __init__(self, mapped: bool) -> None:
        self._backend = "mmap" if mapped else "pread"
        self._open: dict[Path, Any] = {}

    def reader(self, key: str, entry: Entry) -> Any:
        """A function that reads the tensor, or one matrix of it."""

        def read(expert: int | None) -> Any:
            tensor = self._slice(key, entry)
            return tensor[...] if expert is None else tensor[expert]

        return read

    def _slice(self, key: str, entry: Entry) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, "pt", backend=self._backend)
            return self._open[entry.file].get_slice(key)
        except SafetensorError as error:
            why = str(error).splitlines()[0]
            raise WeightsError("WGT-003", f"{entry.file} is damaged", why, "fetch this file again") from None
