"""The adapter added to the original weights, tensor by tensor, in the original checkpoint's files and keys.

W' = W + scale * B A per expert, in fp32 and rounded once to W's type; with DoRA every row of W' is brought to the
length that was trained for it. Headers are kept and every other byte is copied,
so keys, order, shards and tensors without an update come out as they were. A base in fp8 or fp4 comes out in bf16
under the keys of its unquantised twin: its own types are too coarse for an update. Memory: the adapter and one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune import whole
from finetune.base import check_shards, read_config
from finetune.compose import read_recipe
from finetune.errors import WeightsError
from finetune.layouts import LENGTHS, PREFIX, A, B, adaptable, read_adapter
from finetune.rundir import RunDir, atomic_folder, write_json
from finetune.shards import Weight, quantisation_of, weights_of
from finetune.writing import write_weights, written_bytes

CHUNK = 16 * 2**20
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""What is copied beside the weights: config, tokenizer, template, licence."""

Delta = Callable[[int | None], torch.Tensor]
"""The update of a weight in fp32: of one expert, or (None) of the whole tensor as it is stored."""


@dataclass(slots=True)
class Update:
    """The update of one runtime parameter."""

    delta: Delta
    """Gives the update."""
    experts: int
    """Experts of the stack; 0 for a plain matrix."""
    replaces: bool = False
    """Whether it is the new weight itself: full fine-tuning."""
    lengths: torch.Tensor | None = None
    """With DoRA, what length every row of the sum has in the end."""
    parts: set[tuple[int | None, int]] = field(default_factory=set)
    """(expert, part) pairs that were added; the expert is None where the checkpoint holds the whole stack."""
    expected: int = 1
    """How many pairs there must be in the end; known once the first key has shown the layout."""


def merge(run_dir: RunDir) -> None:
    """Writes merged/ of a run: the base with its adapter added. Raises WeightsError (MRG-00x)."""
    from rich.console import Console

    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    adapter = run_dir.require(run_dir.trained, "train")
    merge_folder(base_folder(recipe), adapter, run_dir.merged, Console())


def merge_folder(base: Path, adapter: Path, target: Path, console: Any = None) -> None:
    """Writes the checkpoint in `base` with the PEFT adapter in `adapter` added, into `target`.

    Raises WeightsError: MRG-001 when an update finds no weight or only part of one, MRG-002 when a weight is stored in
    a type that cannot take an update, DSK-002 when the disk is too small.
    """
    shards = check_shards(base)
    quantisation = quantisation_of(json.loads((base / "config.json").read_text(encoding="utf-8")))
    weights = weights_of(base, quantisation).values() if quantisation else ()
    need = sum(map(written_bytes, weights)) or sum(path.stat().st_size for path in shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < need:
        what = f"merging needs {need / 2**30:.1f} GiB in {target.parent}, {free / 2**30:.1f} GiB are free"
        raise WeightsError("DSK-002", what, "", "runs_dir=/larger/disk")
    names = Renamer(base)
    updates = read_updates(adapter, names)
    with atomic_folder(target) as folder:
        changed = 0
        for number, shard in enumerate(shards, 1):
            if quantisation:
                own = [weight for weight in weights if weight.entries[0].file == shard]
                changed += merge_plain(own, folder / shard.name, names, updates)
            else:
                changed += merge_shard(shard, folder / shard.name, names, updates)
            if console is not None:
                console.print(f"merged {number}/{len(shards)} {shard.name}, {changed} tensors changed so far")
        lost = sorted(key for key, update in updates.items() if len(update.parts) != update.expected)
        if lost:
            raise WeightsError(
                "MRG-001",
                f"{len(lost)} of {len(updates)} updates did not reach the checkpoint whole, e.g. {lost[0]}",
                "the adapter does not belong to this base, or its layout is unknown",
                "the base the adapter was trained on",
            )
        for pattern in SMALL_FILES:
            for path in base.glob(pattern):
                if path.name != "finetune.json":
                    shutil.copy2(path, folder / path.name)
        if quantisation:
            describe_plain(folder, {weight.key: weight.entries[0].file.name for weight in weights})
        write_json(
            folder / "merge.json", {"updates": len(updates), "tensors_changed": changed, "base": str(names.model_type)}
        )


def merge_shard(source: Path, target: Path, names: Renamer, updates: dict[str, Update]) -> int:
    """Copies one shard with updates added; returns how many of its tensors changed."""
    from safetensors import safe_open

    changed = 0
    with source.open("rb") as reader, target.open("wb") as writer, safe_open(source, "pt") as tensors:
        size = int.from_bytes(reader.read(8), "little")
        header = reader.read(size)
        writer.write(size.to_bytes(8, "little") + header)
        entries = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, end = entry["data_offsets"]
            runtime, pattern = names.runtime(key)
            if runtime not in updates:
                copy_bytes(reader, writer, 8 + size + start, end - start)
                continue
            tensor = tensors.get_tensor(key)
            if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                what = f"{key} is stored as {tensor.dtype}"
                raise WeightsError("MRG-002", what, "an update cannot be added to it", "a bf16 copy of the base")
            merged = merged_weight(updates[runtime], key, tensor, names.part(pattern)).to(tensor.dtype).contiguous()
            writer.write(merged.view(torch.uint8).numpy().tobytes())
            changed += 1
    return changed


def merge_plain(weights: list[Weight], target: Path, names: Renamer, updates: dict[str, Update]) -> int:
    """Writes weights of a base in fp8 or fp4 as bf16 with updates added; returns how many of them changed."""
    changed = []

    def change(weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        runtime, pattern = names.runtime(weight.key)
        if runtime not in updates:
            return tensor
        changed.append(weight.key)
        merged = merged_weight(updates[runtime], weight.key, tensor, names.part(pattern))
        return merged.to(torch.float32 if weight.is_quantised else tensor.dtype)

    write_weights(weights, target, change)
    return len(changed)


def describe_plain(folder: Path, files: dict[str, str]) -> None:
    """Makes config and index of a folder those of a checkpoint without quantisation."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
    write_json(path, config)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        write_json(index, {"metadata": {}, "weight_map": files})


def merged_weight(update: Update, key: str, tensor: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
    """One checkpoint tensor with its part of an update, in fp32. Raises WeightsError MRG-001."""
    total = part_of(update, key, tensor, part)
    if update.replaces:
        return total
    total = tensor.float() + total
    if update.lengths is None:
        return total
    if part is not None or len(update.lengths) != len(total):
        what = f"{key} is only a part of the weight whose rows have trained lengths"
        raise WeightsError("MRG-001", what, "the checkpoint's layout is unknown", "report this key")
    return total * (update.lengths / total.norm(dim=1))[:, None]


def part_of(update: Update, key: str, tensor: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
    """The part of an update that belongs to one checkpoint tensor, shaped like it. Raises WeightsError MRG-001."""
    expert, index = None, 0
    if part is None:  # stored as the runtime has it
        delta = update.delta(None)
    else:  # one expert's matrix, and of it one of the maps that the runtime joins along the output
        index, count = part
        number = re.search(r"\.(\d+)\.[^.]+(?:\.weight)?$", key)
        if number is None:
            raise WeightsError(
                "MRG-001", f"no expert number in {key}", "the checkpoint's layout is unknown", "report this key"
            )
        expert = int(number[1])
        update.expected = count * update.experts
        delta = update.delta(expert).chunk(count)[index]
    if delta.shape != tensor.shape or (expert, index) in update.parts:
        what = f"{key} is {tuple(tensor.shape)}, its update {tuple(delta.shape)}"
        raise WeightsError("MRG-001", what, "the adapter belongs to another base", "the base it was trained on")
    update.parts.add((expert, index))
    return delta


class Renamer:
    """Checkpoint keys of a folder -> the parameters transformers makes of them, by transformers' own tables."""

    def __init__(self, base: Path) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.family, config = read_config(base)
        self.model_type = config.model_type
        with torch.device("meta"):
            model = getattr(transformers, self.family.auto_class).from_config(config)
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()
        self.skeleton = model

    def is_transposed(self, name: str) -> bool:
        """Whether the module of a stack says that its stacks are (E, in, out); PEFT goes by this mark alone."""
        return bool(getattr(self.skeleton.get_submodule(name.rpartition(".")[0]), "is_transposed", False))

    def runtime(self, key: str) -> tuple[str, str | None]:
        """(parameter name, source pattern of the converter or None) of a checkpoint key."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and key in self.state:
            return key, None
        return renamed, pattern

    def part(self, pattern: str | None) -> tuple[int, int] | None:
        """(index, count) of a source pattern among those its converter joins; None for a tensor kept as it is."""
        if pattern is None:
            return None
        converter = next(entry for entry in self.converters if pattern in entry.source_patterns)
        return converter.source_patterns.index(pattern), len(converter.source_patterns)


def read_updates(adapter: Path, names: Renamer) -> dict[str, Update]:
    """Parameter name -> its update, of a PEFT folder in any layout that `layouts` can read.

    Raises AdapterError (ADP-011 to ADP-016) or, when the base lacks a weight, WeightsError MRG-001.
    """
    if whole.is_tuned(adapter):
        return {name: replacement(name, value, names) for name, value in whole.read(adapter).items()}
    file = read_adapter(adapter, adaptable(names.skeleton, names.family))
    updates = {}
    for update in file.updates:
        a, b = (file.tensors.pop(PREFIX + update.key + end).float() for end in (A, B))
        updates[update.parameter] = update_of(update.parameter, a, b, update.rank, update.scale, names)
        if file.config.use_dora:
            updates[update.parameter].lengths = file.tensors.pop(PREFIX + update.key + LENGTHS).float()
    return updates


def replacement(name: str, value: Delta, names: Renamer) -> Update:
    """The trained weight `name` in place of the base's. Raises WeightsError MRG-001."""
    if name not in names.state:
        what = f"the base has no weight {name}"
        raise WeightsError("MRG-001", what, "these weights are of another base", "the base they were trained from")
    shape = names.state[name].shape
    return Update(value, shape[0] if len(shape) == 3 else 0, replaces=True)


def update_of(name: str, a: torch.Tensor, b: torch.Tensor, rank: int, scale: float, names: Renamer) -> Update:
    """The update of parameter `name` from its LoRA matrices as PEFT stores them. Raises WeightsError MRG-001.

    PEFT takes a stack (E, d1, d2) as (E, out, in) unless its module says `is_transposed`; delta is B A or (B A)^T.
    """
    if name not in names.state:
        raise WeightsError(
            "MRG-001",
            f"the base has no weight {name}",
            "the adapter belongs to another base",
            "the base it was trained on",
        )
    shape = names.state[name].shape
    if len(shape) == 2:
        return Update(lambda _: scale * (b @ a), 0)
    experts = shape[0]
    if a.shape[0] != rank * experts:
        what = f"{name}: lora_A has {a.shape[0]} rows, not {experts} experts x rank {rank}"
        raise WeightsError("MRG-001", what, "the adapter belongs to another base", "the base it was trained on")
    a_ErN = a.reshape(experts, rank, -1)
    b_EMr = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    transposed = names.is_transposed(name)

    def delta(expert: int | None) -> torch.Tensor:
        product = scale * (b_EMr @ a_ErN if expert is None else b_EMr[expert] @ a_ErN[expert])
        return product.mT if transposed else product

    return Update(delta, experts)


def copy_bytes(reader: BinaryIO, writer: BinaryIO, offset: int, length: int) -> None:
    """Copies `length` bytes from `offset` on, in pieces."""
    reader.seek(offset)
    for piece in _pieces(reader, length):
        writer.write(piece)


def _pieces(reader: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = reader.read(min(CHUNK, length))
        length -= len(piece)
        yield piece
