"""Rows that several processes share, a part each, for rows too long for one: `SharedRows`.

Every process runs all layers over its part of the tokens. Only attention sees more: before it, the processes exchange
their parts of all heads for all tokens of a part of the heads, and afterwards they exchange back (Ulysses, Jacobs et
al. 2023, arXiv 2309.14509). Losses, counts and digests are those of whole rows.

Not Accelerate's own two ways (1.15.0), which scripts/accelerate_context.py tries: ring attention has no operation for
CPUs (torch 2.13.0); DeepSpeed's Ulysses (0.19.8) gave gradients twice as large and another loss of accumulated batches
than one process does, and let packed rows see each other. Remove this when it agrees with one process.

Shapes: B rows, L tokens of a row, P of them here, H heads, h of them here, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from finetune.base import read_config
from finetune.context import instead, undivided
from finetune.data.tokens import IGNORED
from finetune.errors import RunError
from finetune.progress import real_tokens
from finetune.ranks import Ranks

ATTENTION = "finetune_shared_rows"
"""Name of this attention in transformers' registries of attention functions and of masks."""
DOCUMENTS = "row_documents"
"""Name beside the model's own inputs, of packed rows only: number of the document that each token of the row is of."""


class SharedRows:
    """This process' part of every row, and attention over all of it. `model` is the base, which is told to use it."""

    def __init__(self, ranks: Ranks, model: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.ranks, self.number = ranks, ranks.rank % ranks.sharing
        self._group = _own_group(ranks)
        self._divided = False
        self._mask: torch.Tensor | None = None
        AttentionInterface.register(ATTENTION, self._attend)
        AttentionMaskInterface.register(ATTENTION, self._no_mask)
        model.set_attn_implementation(ATTENTION)
        if model.config.get_text_config()._attn_implementation != ATTENTION:
            why = f"{type(model).__name__} takes no attention from transformers' registry"
            raise RunError("LCH-013", f"launch.context_parallel={ranks.sharing}", why, "launch.context_parallel=1")

    def read_by_groups(self, loader: Any) -> Any:
        """The data loader that Accelerate has prepared, with the same batches for all processes of a group."""
        batches = loader.batch_sampler
        batches.num_processes, batches.process_index = self.ranks.readers, self.ranks.reader
        batches.even_batches = self.ranks.readers > 1  # a single reader fills no last batch up, as one process does
        return loader

    def part(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process' part of a batch: equal parts, the last one padded with tokens that nobody looks back at.

        (B, L) becomes (B, P), with labels that are shifted already: the next token may be of another part.
        """
        length, sharing = batch["input_ids"].shape[1], self.ranks.sharing
        piece = -(-length // sharing)
        positions = torch.arange(length, device=batch["input_ids"].device).expand_as(batch["input_ids"])
        whole = {
            "input_ids": batch["input_ids"],
            "attention_mask": real_tokens(batch).long(),
            "position_ids": batch.get("position_ids", positions),
            "shift_labels": pad(batch["labels"][:, 1:], (0, 1), value=IGNORED),
        }
        begin = self.number * piece
        filled = {
            name: pad(value, (0, piece * sharing - length), value=IGNORED if name == "shift_labels" else 0)
            for name, value in whole.items()
        }
        mine = {name: value[:, begin : begin + piece].contiguous() for name, value in filled.items()}
        mine["labels"] = mine["shift_labels"]  # without any a model computes no loss
        if "position_ids" in batch:
            mine[DOCUMENTS] = (filled["position_ids"] == 0).cumsum(1)
        return mine | {name: value for name, value in batch.items() if name not in mine}

    @contextmanager
    def attending(self, batch: dict[str, Any]) -> Iterator[None]:
        """In the block attention is over whole rows of which `part` has given this process its part."""
        documents = batch.pop(DOCUMENTS, None)
        self._divided, self._mask = True, None if documents is None else _within(documents)
        try:
            yield
        finally:
            self._divided, self._mask = False, None

    def _no_mask(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' mask of a whole batch; of a part there is none."""
        from transformers.masking_utils import sdpa_mask

        return None if self._divided else sdpa_mask(*args, **kwargs)

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention as transformers calls it: (B, H, P, D) three times, gives (B, P, H, D)."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if not self._divided:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        # Padding stands at the end of a row, where no real token looks: rows that are not packed need no mask.
        query, key, value = (self._all_tokens(states) for states in (query, key, value))
        mixed, _ = sdpa_attention_forward(module, query, key, value, self._mask, **kwargs)
        return self._all_heads(mixed), None

    def _all_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(B, H, P, D) -> (B, h, L, D)."""
        rows, heads, piece, width = states.shape
        sharing = self.ranks.sharing
        apart = states.reshape(rows, sharing, heads // sharing, piece, width).movedim(1, 0)
        whole: torch.Tensor = Exchange.apply(apart, self._group).permute(1, 2, 0, 3, 4)
        return whole.reshape(rows, heads // sharing, sharing * piece, width)

    def _all_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, h, D) -> (B, P, H, D)."""
        rows, length, heads, width = states.shape
        sharing = self.ranks.sharing
        apart = states.reshape(rows, sharing, length // sharing, heads, width).movedim(1, 0)
        whole: torch.Tensor = Exchange.apply(apart, self._group).permute(1, 2, 0, 3, 4)
        return whole.reshape(rows, length // sharing, sharing * heads, width)


class Exchange(torch.autograd.Function):
    """Piece n along the first dimension goes to process n of the group; what comes stands in the order of processes.

    torch 2.13.0 has the same as `torch.distributed.nn.functional.all_to_all_single`, deprecated for a private module.
    """

    @staticmethod
    def forward(context: Any, pieces: torch.Tensor, group: Any) -> torch.Tensor:
        """The pieces that the others had for this process."""
        context.group = group
        come = torch.empty(pieces.shape, dtype=pieces.dtype, device=pieces.device)
        dist.all_to_all_single(come, pieces.contiguous(), group=group)
        return come

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradients go back the way that pieces came."""
        return Exchange.apply(gradients[0], context.group), None


def require_shareable(folder: Path, ranks: Ranks) -> None:
    """Nothing, or RunError (LCH-013) when the processes cannot share rows of the model in `folder`."""
    if ranks.sharing == 1:
        return
    family, config = read_config(folder)
    text = config.get_text_config().to_dict()
    if why := undivided(family, text, ranks.sharing):
        raise RunError("LCH-013", f"launch.context_parallel={ranks.sharing}", why, instead(text, ranks.sharing))


def _own_group(ranks: Ranks) -> Any:
    """The group of this process' neighbours, which hold the other parts. Every process makes all of them."""
    groups = [dist.new_group([*range(n, n + ranks.sharing)]) for n in range(0, ranks.world, ranks.sharing)]
    return groups[ranks.reader]


def _within(documents: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, 1, L, L), True where a token sees another: itself and earlier ones of its document."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
