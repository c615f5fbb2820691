"""How evenly the router spreads tokens over the experts of each layer, while the adapter trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from finetune.progress import real_tokens

EVERY = 10
"""Updates between two readings."""


class RouterLoad(TrainerCallback):
    """Counts the tokens that each expert gets, layer by layer, on the device; read every `EVERY` updates and at last.

    Hooks see which experts every routed block is called with, whether these are adapted or not. Counted are the tokens
    of training batches without padding, once: a layer that recomputes its activations is called a second time, but
    outside the model's forward pass. In the logs of a step with a reading stand `router/<layer>/...`, for trackers.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._counts: dict[str, torch.Tensor] = {}
        self._window: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._steps, self._steps_before = 0, 0
        self._real_T: torch.Tensor | None = None
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hooks into the model and its experts modules."""
        model = kwargs["model"]
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for path, module in model.named_modules():
            if hasattr(module, "finetune_layout"):
                layer = path.removeprefix("base_model.model.").replace(".base_layer", "")
                experts = next(iter(module.finetune_layout.shapes.values()))[0]
                device = next(module.parameters()).device
                # One more than there are: the id of "an expert that is not here" (expert parallelism).
                self._window[layer] = torch.zeros(experts + 1, dtype=torch.long, device=device)
                self._before[layer] = torch.zeros_like(self._window[layer])
                self._counts[layer] = torch.zeros_like(self._window[layer])
                self._hooks.append(module.register_forward_pre_hook(self._counter(layer), with_kwargs=True))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds the readings of the last updates to the logs, every `EVERY` updates and at the last one."""
        if not logs or "loss" not in logs or not self._window:
            return
        self._steps += 1
        if (state.global_step - 1) % EVERY and state.global_step != state.max_steps:
            return  # by the step alone: a process that joined later has counted fewer
        window = _over_ranks(self._window)
        for layer, counts in window.items():
            self._counts[layer] += counts
            logs |= {f"router/{layer}/{name}": value for name, value in load(counts[:-1].tolist()).items()}
        self._before, self._steps_before, self._steps = window, self._steps, 0
        self._window = {layer: torch.zeros_like(counts) for layer, counts in window.items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the count, and says which experts got no token."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        summary = self.summary()
        dead = {layer: found["dead_experts"] for layer, found in summary.items() if found["dead_experts"]}
        if dead:
            all_experts = sum(len(found["tokens"]) for found in summary.values())
            layer = max(dead, key=lambda name: len(dead[name]))
            self.console.print(
                f"warning: {sum(map(len, dead.values()))} of {all_experts} experts got no token in the whole training, "
                f"in {len(dead)} of {len(summary)} layers, e.g. {layer}: {_some(dead[layer])}; they learn nothing",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Layer -> tokens of each expert, their evenness, and the experts without any, as train.json has it.

        `dead_lately` are those without a token in the last reading, which covers `steps` updates.
        """
        return {
            layer: {
                **load(counts[:-1].tolist()),
                "dead_experts": _idle(counts),
                "dead_lately": {"steps": self._steps_before, "experts": _idle(self._before[layer])},
                "tokens": counts[:-1].tolist(),
            }
            for layer, counts in self._counts.items()
        }

    def memory(self) -> dict[str, Any]:
        """What was counted: by all processes up to the last reading, and by this one since."""
        return {
            "all": self._counts,
            "since": self._window,
            "before": self._before,
            "steps": [self._steps, self._steps_before],
        }

    def add(self, memory: dict[str, Any]) -> None:
        """Takes up the counts of a checkpoint; those of a process that is gone are added to this one's."""
        for name, mine in (("all", self._counts), ("before", self._before)):
            for layer, counts in memory[name].items():  # the same in every process
                mine[layer] = counts.to(mine[layer].device) if layer in mine else counts
        for layer, counts in memory["since"].items():
            window = self._window[layer] if layer in self._window else torch.zeros_like(counts)
            self._window[layer] = window + counts.to(window.device)
        self._steps, self._steps_before = memory["steps"]

    def _enter(self, model: Any, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        self._real_T = real_tokens(batch).reshape(-1).long() if model.training else None

    def _leave(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        self._real_T = None  # what experts are called with from now on is a recomputation

    def _counter(self, layer: str) -> Any:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._real_T is None:
                return
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            real = self._real_T.to(index.device)
            each = real.repeat_interleave(index.numel() // real.numel(), output_size=index.numel())
            self._window[layer].index_add_(0, index.reshape(-1).long(), each)

        return count


def load(tokens: list[int]) -> dict[str, float]:
    """How even some counts are.

    Entropy over the largest it can be (1 = all alike, 0 = one has all), share of the largest, and how many are zero.
    """
    total = sum(tokens)
    shares = [count / total for count in tokens if count]
    most = math.log(len(tokens))
    return {
        "entropy": round(-sum(share * math.log(share) for share in shares) / most, 4) + 0.0 if most else 1.0,
        "busiest_share": round(max(shares, default=0.0), 4),
        "dead": tokens.count(0),
    }


def _idle(counts: torch.Tensor) -> list[int]:
    return [expert for expert, count in enumerate(counts[:-1].tolist()) if not count]


def _some(experts: list[int]) -> str:
    return ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")


def _over_ranks(window: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The counts of all processes: one sum over one tensor."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return window
    summed = torch.cat(list(window.values()))
    torch.distributed.all_reduce(summed)
    return dict(zip(window, summed.split([counts.numel() for counts in window.values()]), strict=True))
