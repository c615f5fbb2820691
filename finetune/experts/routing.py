"""Tokens sorted by expert: where each token-choice pair stands, so that both ways add up in a fixed order.

Two plans of the same thing. `route` is for a CPU: groups as Python numbers, each padded to one of few lengths.
`route_on_device` is for a GPU: offsets stay there, nothing waits for the host, and nothing is padded.

An id equal to the number of experts means "an expert that is not here" (expert parallelism): such a choice adds nothing
and gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS = 32
"""Shorter groups are padded to a power of two."""

STEPS = 8
"""Lengths between a power of two and the next to which longer groups are padded: 6 % of their rows or so."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where each (token, choice) pair stands among the rows sorted by expert."""

    token_P: torch.Tensor
    """Token whose values a row holds. Rows that only fill up a group hold token 0 and are never read back."""
    position_TK: torch.Tensor
    """Row of each pair."""
    kept_TK: torch.Tensor | None
    """Which pairs have an expert here; None when all have."""
    expert_P: torch.Tensor
    """Expert of each row."""
    groups: list[tuple[int, int, int]] | None
    """(expert, first row, end row) of every expert with tokens; None on a device, where `offsets_E` says it."""
    offsets_E: torch.Tensor | None
    """int32 end row of every expert; None on a CPU."""


def padded(count: int, fill: bool) -> int:
    """Rows that a group of `count` takes. Filling up keeps the number of different matrix shapes small."""
    if not fill or count == 0:
        return count
    power = 1 << (count - 1).bit_length()
    step = max(power // 2 // STEPS, ROWS // 2)
    return max(8, power) if count <= ROWS else -(-count // step) * step


def route(index_TK: torch.Tensor, num_experts: int, *, fill: bool = True, absent: bool = False) -> Routing:
    """Sorts (token, choice) pairs by expert, stably, with the groups as Python numbers.

    `fill` pads groups: oneDNN builds a kernel for every new matrix shape. `absent` allows the id `num_experts`.
    Raises ValueError for any other id out of range.
    """
    tokens, choices = index_TK.shape
    ids = index_TK.reshape(-1)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_experts + absent):
        raise ValueError(f"routing names expert {int(ids.max())} of {num_experts}: expert parallelism is not supported")
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + absent).tolist()
    sizes = [padded(count, fill) for count in counts]
    groups, start = [], 0
    for expert, size in enumerate(sizes[:num_experts]):
        if size:
            groups.append((expert, start, start + size))
        start += size
    sorted_ids, sizes_E, counts_E = ids[order], ids.new_tensor(sizes), ids.new_tensor(counts)
    shift_E = (sizes_E.cumsum(0) - sizes_E) - (counts_E.cumsum(0) - counts_E)
    rows = torch.arange(ids.numel(), device=ids.device) + shift_E[sorted_ids]
    position = torch.empty_like(ids)
    position[order] = rows
    token_P = torch.zeros(sum(sizes), dtype=torch.long, device=ids.device)
    token_P[rows] = order // max(choices, 1)
    return Routing(
        token_P=token_P,
        position_TK=position.view(tokens, choices),
        kept_TK=index_TK < num_experts if absent else None,
        expert_P=torch.arange(len(sizes), device=ids.device).repeat_interleave(sizes_E),
        groups=groups,
        offsets_E=None,
    )


def route_on_device(index_TK: torch.Tensor, num_experts: int, *, absent: bool = False) -> Routing:
    """Sorts (token, choice) pairs by expert, stably, without a number leaving the device.

    P is T*K whatever the ids are. Ids are not looked at: one out of range is the caller's mistake, except `num_experts`
    where `absent` says so; those rows come last and belong to no group.
    """
    tokens, choices = index_TK.shape
    sorted_ids, order = torch.sort(index_TK.reshape(-1), stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    bounds = torch.arange(num_experts, device=order.device, dtype=sorted_ids.dtype)
    return Routing(
        token_P=order // choices,
        position_TK=position.view(tokens, choices),
        kept_TK=index_TK < num_experts if absent else None,
        expert_P=sorted_ids,
        groups=None,
        offsets_E=torch.searchsorted(sorted_ids, bounds, right=True).to(torch.int32),
    )


def kept(rows_TKH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The rows with those of absent experts zero: what a grouped product leaves there may be anything."""
    return rows_TKH if routing.kept_TK is None else rows_TKH.masked_fill(~routing.kept_TK.unsqueeze(-1), 0)
