"""`python -m tests.fsdp_bytes RUN OUT`: one of several processes that notes the bytes of 4-bit weights it holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bitsandbytes.nn import Linear4bit

import tests.fsdp_on_cpu  # noqa: F401  # FSDP2 over gloo on a CPU
from finetune.compose import read_recipe
from finetune.rundir import RunDir


def main(words: list[str]) -> int:
    run, out = words
    import torch
    from rich.console import Console

    from finetune.ranks import expected
    from finetune.stop import Request
    from finetune.train.distribute import join
    from finetune.train.parts import Parts
    from finetune.train.stage import prepare

    run_dir = RunDir(Path(run))
    recipe = read_recipe(run_dir.recipe)
    job = prepare(recipe, run_dir, join(recipe), out + "-scratch", Console(quiet=True), Request())
    trainer = job.trainer
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    parts = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Parts))
    read = sum(mine.numel() * mine.element_size() for _, _, mine in parts.held)
    parts.on_train_begin(None, None, None, model=trainer.model)
    after, whole = _bytes(trainer.model, whole=False), _bytes(trainer.model, whole=True)
    assert read == after[0]  # no process read more of the stacks than it holds
    held = {"mine": sum(after), "whole": sum(whole), "experts_mine": after[0], "experts_whole": whole[0]}
    Path(f"{out}-{expected()[0]}").write_text(json.dumps(held))
    torch.distributed.destroy_process_group()
    return 0


def _bytes(model, *, whole):
    """(bytes of packed expert stacks and their maxima, bytes of packed linear maps and theirs)."""
    experts = linears = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if hasattr(module, "finetune_layout"):
            experts += sum(_size(parameter, whole) for parameter in own.values())
        elif isinstance(module, Linear4bit):
            own.pop("bias", None)
            tensors = [*own.values(), module.quant_state.absmax]
            linears += sum(_size(tensor, whole) for tensor in {id(tensor): tensor for tensor in tensors}.values())
    return experts, linears


def _size(tensor, whole):
    """Bytes of a tensor put together, or those that this process keeps for it, whatever part of them it looks at."""
    if whole:
        return tensor.numel() * tensor.element_size()
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage().nbytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
