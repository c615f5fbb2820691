"""`python -m tests.shared_rows OUT`: one of two processes that share rows, on tiny models of every family that can.

It writes what it found into OUT-RANK: for every family the largest difference to what one process computes of the whole
rows, how long the hidden states of a row were in the layers, and the bytes kept for the backward pass beside weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from finetune.base import load_base
from finetune.families import FAMILIES
from finetune.ranks import Ranks
from finetune.tiny import write_tiny
from finetune.train.shared_rows import SharedRows

LENGTH, SPLIT = 13, 5
"""Tokens of a row, which two cannot share evenly, and of the first of two documents that are packed into one."""


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    keys = [key for key, family in FAMILIES.items() if not family.undivided]
    with tempfile.TemporaryDirectory() as folder:
        for key in keys:  # a process among others would write its part only
            write_tiny(FAMILIES[key], Path(folder) / key, seed=7)
        dist.init_process_group("gloo")
        ranks = Ranks.here(2)
        bases = ((key, load_base(Path(folder) / key, load_in_4bit=False, precision="fp32")) for key in keys)
        found = {key: compare(base, ranks) for key, base in bases}
    Path(f"{words[0]}-{ranks.rank}").write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0


def compare(base, ranks):
    model = base.model.train()
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    batches = {"padded": padded(), "packed": packed()}
    one = {name: step(model, embeddings, whole(batch), trained(batch)) for name, batch in batches.items()}
    shared, lengths = SharedRows(ranks, model), set()
    kind = type(model.get_decoder().layers[0])
    for layer in [module for module in model.modules() if isinstance(module, kind)]:
        layer.register_forward_hook(lambda layer, given, made: lengths.add(given[0].shape[1]))
    found = {}
    for name, batch in batches.items():
        logits, gradient, kept = divided(model, embeddings, shared, batch, trained(batch))
        found[f"{name} kept"] = kept / one[name][2]
        begin = shared.number * logits.shape[1]
        mine = one[name][0][:, begin : begin + logits.shape[1]]
        real = batch.get("attention_mask", torch.ones(1, LENGTH))[:, begin : begin + logits.shape[1]].bool()
        dist.all_reduce(gradient)
        found[name] = (logits[:, : mine.shape[1]] - mine)[real].abs().max().item()
        found[f"{name} gradient"] = (gradient - one[name][1]).abs().max().item()
    found["lengths"] = sorted(lengths)
    batch = packed()
    before, *_ = divided(model, embeddings, shared, batch, 1)
    batch["input_ids"][:, :SPLIT] += 1
    after, *_ = divided(model, embeddings, shared, batch, 1)
    changed = (after - before).abs().amax((0, 2))
    place = torch.arange(len(changed)) + shared.number * len(changed)
    found["second document"] = changed[(place >= SPLIT) & (place < LENGTH)].max().item()
    found["first document"] = changed[place < SPLIT].sum().item()
    again, *_ = step(model, embeddings, whole(batches["padded"]), trained(batches["padded"]))
    found["whole"] = (again - one["padded"][0]).abs().max().item()
    return found


def padded():
    """Two rows, one with padding; all that is trained stands in their second halves, so that one part has nothing."""
    ids = torch.randint(3, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    labels[mask == 0] = labels[:, :8] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed():
    """Two documents in a row; the second is of both parts."""
    ids = torch.randint(3, 1000, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, 0] = labels[0, SPLIT] = -100
    positions = torch.cat([torch.arange(SPLIT), torch.arange(LENGTH - SPLIT)])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def trained(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def whole(batch):
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return {name: value for name, value in batch.items() if name != "labels"} | {"shift_labels": labels}


def divided(model, embeddings, shared, batch, count):
    mine = shared.part(batch)
    with shared.attending(mine):
        return step(model, embeddings, {name: mine[name] for name in mine if name != "labels"}, count)


def step(model, embeddings, batch, count):
    """(logits, gradient of the embeddings, bytes kept) of the sum of the losses of a batch over `count`."""
    embeddings.grad = None
    given = {name: value for name, value in batch.items() if name != "shift_labels"}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(**given, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), ignore_index=-100, reduction="sum")
    (loss / count).backward()
    return logits.detach(), embeddings.grad.clone(), sum(kept.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
