"""Parts of 4-bit weights in the places that FSDP2 makes for them: `Parts`."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import TrainerCallback

from finetune.errors import RunError


class Parts(TrainerCallback):
    """Puts the parts of expert stacks that this process has read into the places FSDP2 makes for them.

    Until then a stand-in on the meta device has the shape of the whole stack, so that no process ever holds one.
    Maxima of linear maps, which bitsandbytes keeps beside a weight where FSDP2 does not see them, become parameters.
    """

    def __init__(self, model: Any) -> None:
        self.held: list[tuple[Any, str, Any]] = []
        for module in model.modules():
            if hasattr(module, "finetune_layout"):
                experts = next(iter(module.finetune_layout.shapes.values()))[0]
                for name, mine in list(module.named_parameters(recurse=False)):
                    whole = mine.new_empty((experts, *mine.shape[1:]), device="meta")
                    setattr(module, name, nn.Parameter(whole, requires_grad=False))
                    self.held.append((module, name, mine.detach()))
        self.maps = [module for module in model.modules() if isinstance(module, Linear4bit)]
        for module in self.maps:
            module.register_parameter("absmax", nn.Parameter(module.quant_state.absmax, requires_grad=False))
            module.register_forward_pre_hook(take_maxima)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fills the places. Raises RunError (LCH-010) where FSDP2 has left a weight whole or split it otherwise."""
        from torch.distributed.tensor import DTensor

        for module, name, mine in self.held:
            place = getattr(module, name)
            if not isinstance(place, DTensor) or place.to_local().shape != mine.shape:
                raise RunError("LCH-010", f"{name}: FSDP2 did not split it by experts", "", "launch.distribution=ddp")
            mesh, shape, stride = place.device_mesh, place.shape, place.stride()
            part = DTensor.from_local(mine, mesh, place.placements, run_check=False, shape=shape, stride=stride)
            module.load_state_dict({name: part}, strict=False, assign=True)
        self.held = []
        for module in self.maps:
            take_maxima(module)  # the whole ones are let go
        whole = [name for name, parameter in kwargs["model"].named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            what = f"{len(whole)} weights are whole in every process, e.g. {whole[0]}"
            raise RunError("LCH-010", what, "FSDP2 was to split them all", "launch.distribution=ddp")


def take_maxima(module: Any, *_: Any) -> None:
    """Gives bitsandbytes the maxima as they are now: this process' part, or what FSDP2 has put together.

    FSDP2 puts them together in one and the same tensor, so the backward pass has them too.
    """
    module.quant_state.absmax = module.absmax
