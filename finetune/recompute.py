"""Which layers recompute their activations in the backward pass: as few as memory demands."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from finetune import machine, memory
from finetune.ranks import Ranks
from finetune.recipe import Recipe


class Recompute(TrainerCallback):
    """Of a model that recomputes activations, only as many layers do as the recipe says or memory demands."""

    def __init__(self, recipe: Recipe, block_class: str, console: Console, ranks: Ranks) -> None:
        self.recipe, self.block_class, self.console, self.ranks = recipe, block_class, console, ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switches recomputing off in the layers that need not: `gradient_checkpointing` is a layer's own switch."""
        if not args.gradient_checkpointing:
            return
        layers = [module for module in kwargs["model"].modules() if self._is_layer(module)]
        wanted, why = self.recipe.train.checkpointed_layers, "train.checkpointed_layers"
        if not wanted:
            free = min(self.ranks.gather(free_gib()))  # in other layers they would wait for each other in vain
            wanted = memory.layers_to_recompute(self.recipe, len(layers), free)
            why = f"{free:.1f} GiB are free"
        for layer in layers[wanted:]:
            layer.gradient_checkpointing = False
        self.console.print(f"recomputing activations in {min(wanted, len(layers))} of {len(layers)} layers: {why}")

    def _is_layer(self, module: Any) -> bool:
        """FSDP2 gives a module a class of its own, below the one it had."""
        return any(kind.__name__ == self.block_class for kind in type(module).__mro__)


def free_gib() -> float:
    """Memory that training may still take: of the GPU when there is one, else of this machine, in GiB."""
    import torch

    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + cached) / 2**30
    return machine.available_gib()
