"""What a merge will write, known from headers alone: `make_plan(base, adapter, how)`. What cannot be, it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import WeightsError
from finetune.experts.loading import linears_to_keep
from finetune.merge.four_bit import FourBit
from finetune.merge.names import Renamer
from finetune.merge.updates import New, Pair, Replacement, Update, foreign, read_updates
from finetune.shards import FP8_TYPES, Entry, Weight, quantisation_of, read_headers, weights_of

PLAIN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types that an update can be added to, in safetensors' words."""

EXPERT = re.compile(r"\.(\d+)\.[^.]+(?:\.weight)?$")


@dataclass(frozen=True, slots=True)
class How:
    """What a merge is to do with quantised weights."""

    quantised: str = "bf16"
    """What a base in fp8 or fp4 becomes: `bf16`, or `requantise` for fp8 with new scales in the same layout."""
    four_bit: FourBit | None = None
    """How training held the base, where the update is to be added to that; None for the original weights."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of an update that belongs to one tensor of a checkpoint."""

    update: Update | Replacement
    """The update."""
    expert: int | None
    """Whose matrix it is; None for a plain matrix, or the whole stack."""
    index: int = 0
    """Which of the `count` parts of the rows that the runtime joins."""
    count: int = 1
    """How many tensors make one matrix."""

    def pair(self, matrix: int | None) -> Pair | New:
        """The update of the tensor's only matrix (None), or of one of its stack."""
        return self.update.pair(self.expert if matrix is None else matrix, self.index, self.count)


@dataclass(slots=True)
class Change:
    """A tensor that is not simply copied."""

    key: str
    """Its key in the merged checkpoint."""
    weight: Weight
    """The weight of the base that it begins with."""
    share: Share | None = None
    """What is added to it."""
    in_4bit: bool = False
    """Training held it in 4 bits, and it begins with what training saw."""
    stacked: bool = False
    """It is an expert stack, or a part of one."""
    whole: list[Weight] | None = None
    """All tensors of the matrix, in order, where 4 bits cannot be computed from one part alone."""

    @property
    def is_wanted(self) -> bool:
        """Whether its numbers are to differ from the base's; the others only change their type."""
        return self.share is not None or self.in_4bit


@dataclass(slots=True)
class Plan:
    """A whole merge."""

    base: Path
    """Folder of the base."""
    how: How
    """What becomes of quantised weights."""
    quantisation: dict[str, Any]
    """The quantization_config of the base; empty for plain numbers."""
    names: Renamer
    """Keys and parameters."""
    updates: dict[str, Update | Replacement]
    """Parameter -> its update."""
    entries: dict[str, Entry]
    """Key -> where every tensor of the base is."""
    weights: dict[str, Weight]
    """Key -> weight, scales folded in."""
    changes: dict[str, Change] = field(default_factory=dict)
    """Key -> a tensor whose numbers are to change."""
    extras: list[Change] = field(default_factory=list)
    """Tensors that the base has not: the other end of embeddings that were tied."""
    untied: bool = False
    """Embeddings were tied in the base and are not any longer."""

    @property
    def keeps_layout(self) -> bool:
        """Whether the files come out with the keys, types and places of the base's."""
        return not self.quantisation or self.how.quantised == "requantise"

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of fp8 values, where config.json says them."""
        size = self.quantisation.get("weight_block_size")
        return (int(size[0]), int(size[1])) if size else None


def make_plan(base: Path, adapter: Path, how: How) -> Plan:
    """The plan of a merge. Reads config, headers and the adapter.

    Raises WeightsError: MRG-001 when an update finds no weight or only part of one, MRG-002 when a weight is stored in
    a type that takes no update, MRG-003 when it cannot be requantised, MRG-005 when tied embeddings cannot be parted.
    """
    quantisation = quantisation_of(json.loads((base / "config.json").read_text(encoding="utf-8")))
    if how.quantised == "requantise" and not quantisation:
        what = f"merge.quantised=requantise: {base} is not quantised"
        raise WeightsError("MRG-003", what, "it would have no effect", "merge.quantised=bf16")
    names, entries = Renamer(base), read_headers(base)
    if quantisation:
        weights = weights_of(base, quantisation, mapped=False)
    else:
        weights = {key: Weight(key, None, entry.shape, (entry,)) for key, entry in entries.items()}
    plan = Plan(base, how, quantisation, names, read_updates(adapter, names), entries, weights)
    in_4bit = four_bit_parameters(names) if how.four_bit else {}
    stacks: dict[tuple[str, int], dict[int, Weight]] = {}
    places: dict[str, list[str]] = {}
    for key, weight in weights.items():
        parameter, pattern = names.runtime(key)
        part = names.part(pattern)
        places.setdefault(parameter, []).append(key)
        if parameter not in plan.updates and parameter not in in_4bit:
            continue
        expert = None if part is None else expert_of(key)
        change = Change(key, weight, in_4bit=parameter in in_4bit, stacked=in_4bit.get(parameter, False))
        if parameter in plan.updates:
            change.share = share_of(plan.updates[parameter], key, weight.shape, expert, part)
        if part is not None and expert is not None:
            stacks.setdefault((parameter, expert), {})[part[0]] = weight
        plan.changes[key] = change
    _find_siblings(plan, stacks)
    _untie(plan, places)
    _require_whole(plan.updates)
    for change in [*plan.changes.values(), *plan.extras]:
        _check_type(plan, change)
    return plan


def expert_of(key: str) -> int:
    """The expert's number in a key. Raises WeightsError MRG-001."""
    number = EXPERT.search(key)
    if number is None:
        why = "the checkpoint's layout is unknown"
        raise WeightsError("MRG-001", f"no expert number in {key}", why, "report this key")
    return int(number[1])


def share_of(
    update: Update | Replacement, key: str, shape: tuple[int, ...], expert: int | None, part: tuple[int, int] | None
) -> Share:
    """The part of an update that belongs to one checkpoint tensor, noted as used. Raises WeightsError MRG-001."""
    index, count = part or (0, 1)
    if part is not None:
        update.expected = count * update.experts
    wanted = update.stored(expert, count)
    out_of_range = expert is not None and expert >= update.experts
    if wanted != shape or out_of_range or (expert, index) in update.parts:
        raise foreign(f"{key} is {shape}, its update {wanted} of {max(update.experts, 1)}")
    if update.lengths is not None and count > 1:
        what = f"{key} is only a part of the weight whose rows have trained lengths"
        raise WeightsError("MRG-001", what, "the checkpoint's layout is unknown", "report this key")
    update.parts.add((expert, index))
    return Share(update, expert, index, count)


def four_bit_parameters(names: Renamer) -> dict[str, bool]:
    """Parameters that loading holds in 4 bits -> whether they are expert stacks."""
    family, model = names.family, names.skeleton
    kept = set(linears_to_keep(model, family))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - kept
    found = {f"{path}.weight": False for path in linear}
    if family.experts:
        for path, module in model.named_modules():
            if type(module).__name__ == family.experts_class and path.endswith("." + family.experts):
                found |= {f"{path}.{name}": True for name in family.expert_parameters}
    return found


def _find_siblings(plan: Plan, stacks: dict[tuple[str, int], dict[int, Weight]]) -> None:
    """For tensors in 4 bits that are parts of a matrix: the other parts, where packing needs them."""
    four_bit = plan.how.four_bit
    for parts in stacks.values() if four_bit else ():
        ordered = [parts[index] for index in sorted(parts)]
        values = [weight.shape[0] * weight.shape[1] for weight in ordered]
        if four_bit and all(map(four_bit.is_local, values)):
            continue
        for weight in ordered:
            plan.changes[weight.key].whole = ordered


def _untie(plan: Plan, places: dict[str, list[str]]) -> None:
    """Gives each end of tied embeddings a tensor of its own where one of them has an update.

    Beside a frozen base the adapter changes one end alone, whatever the config says of both.
    """
    for target, source in plan.names.tied.items():
        ends = [end for end in (target, source) if end in plan.updates]
        if not ends:
            continue
        plan.untied = True
        for end, other in ((target, source), (source, target)):
            if end in places:
                continue
            if other not in places or plan.names.runtime(end) != (end, None) or end in plan.entries:
                what = f"{' and '.join(ends)}: the base ties it to another weight, and they cannot be told apart"
                raise WeightsError("MRG-005", what, "the name of its file is unknown", "an adapter without this weight")
            weight = plan.weights[places[other][0]]
            share = share_of(plan.updates[end], end, weight.shape, None, None) if end in ends else None
            plan.extras.append(Change(end, weight, share))


def _require_whole(updates: dict[str, Update | Replacement]) -> None:
    lost = sorted(key for key, update in updates.items() if len(update.parts) != update.expected)
    if lost:
        raise WeightsError(
            "MRG-001",
            f"{len(lost)} of {len(updates)} updates do not reach the checkpoint whole, e.g. {lost[0]}",
            "the adapter does not belong to this base, or its layout is unknown",
            "the base the adapter was trained on",
        )


def _check_type(plan: Plan, change: Change) -> None:
    """Raises WeightsError MRG-002 or MRG-003 unless a tensor can take what it is to get."""
    values, *scales = change.weight.entries
    if not scales and values.dtype not in PLAIN_TYPES and change.is_wanted:
        what = f"{change.key} is stored as {values.dtype}"
        raise WeightsError("MRG-002", what, "an update cannot be added to it", "a bf16 copy of the base")
    if not scales or not plan.keeps_layout:
        return
    if values.dtype not in FP8_TYPES:
        what = f"merge.quantised=requantise: {change.key} is stored in 4 bits"
        raise WeightsError("MRG-003", what, "that is too coarse for an update", "merge.quantised=bf16")
    if len(values.shape) == 3 and scales[0].shape[:1] != values.shape[:1]:
        what = f"merge.quantised=requantise: the experts of {change.key} share one scale"
        raise WeightsError("MRG-003", what, "it would have to fit all of them", "merge.quantised=bf16")
