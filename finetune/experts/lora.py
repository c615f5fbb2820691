"""PEFT's LoRA layer for expert stacks, with the update applied in split form. Files it writes are stock PEFT files."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper

from finetune.experts.grouped import Factors
from finetune.experts.stack import is_packed, layout_of


class ExpertsLora(PeftParamWrapper):
    """LoRA on one stack of an experts module; PEFT nests one wrapper per stack.

    `forward` adds its factors to the keyword argument `lora` and calls what it wraps; the innermost call is
    `grouped.experts_forward`. On disk (PEFT 0.19 and later): lora_A (E*r, in) expert-major, lora_B (out, r*E)
    expert-minor.
    """

    def get_param(self) -> torch.Tensor:
        """The stack, or for a packed one a stand-in on the meta device with its logical shape and type."""
        module = self.get_base_layer()
        if is_packed(module, self.parameter_name):
            layout = layout_of(module)
            return torch.empty(layout.shapes[self.parameter_name], dtype=layout.dtype, device="meta")
        stack: torch.Tensor = getattr(module, self.parameter_name)
        return stack

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Puts the factors where the stack is, in fp32: bf16 factors lose small updates."""
        device = device or getattr(self.get_base_layer(), self.parameter_name).device
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and not any(p.is_meta for p in factors[adapter_name].parameters()):
                factors[adapter_name].to(device, dtype=torch.float32)

    def factors(self, adapter_name: str) -> Factors:
        """The update in the direction of the product: x -> scale (x @ left[e]) @ right[e]."""
        a_ErI = self.lora_A[adapter_name].weight.reshape(self.num_experts, -1, self.in_features)
        b_EOr = self.lora_B[adapter_name].weight.reshape(self.out_features, -1, self.num_experts).permute(2, 0, 1)
        # PEFT takes (E, d1, d2) as (E, out, in) unless the module says is_transposed, which not every transposed class
        # does. delta (E, d1, d2) is B A when it swapped and A^T B^T when it did not; y = x delta or x delta^T.
        first, second = (b_EOr, a_ErI) if self._did_swap_in_out_features else (a_ErI.mT, b_EOr.mT)
        if not layout_of(self.get_base_layer()).transposed:
            first, second = second.mT, first.mT
        return Factors(first.contiguous(), second.contiguous(), self.scaling[adapter_name])

    def rows_with_a_gradient(self) -> list[int]:
        """How many rows with a gradient each expert got since the model was loaded."""
        heard = getattr(self.get_base_layer(), "finetune_heard", None)
        counts: list[int] = [0] * self.num_experts if heard is None else heard.tolist()
        return counts

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts' output with this stack's update. Raises ValueError with several active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapters per row are not supported on expert stacks")
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not self.disable_adapters and active:
            if len(active) > 1:
                raise ValueError(f"one adapter at a time on expert stacks, not {active}")
            # PeftModel keeps wrappers per layer: the dict is made new for every call and shared by nested wrappers.
            kwargs["lora"] = {**kwargs.pop("lora", {}), self.parameter_name: self.factors(active[0])}
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a 4-bit stack cannot take an update. `finetune.merge` adds it to the original weights."""
        raise ValueError("experts are not merged in place: use python -m finetune merge run=PATH")

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The full update (E, d1, d2) as stored, in fp32 on the factors' device."""
        a_ErI = self.lora_A[adapter_name].weight.reshape(self.num_experts, -1, self.in_features).float()
        b_EOr = self.lora_B[adapter_name].weight.reshape(self.out_features, -1, self.num_experts).permute(2, 0, 1)
        delta = torch.bmm(b_EOr.float(), a_ErI) * self.scaling[adapter_name]
        return delta if self._did_swap_in_out_features else delta.mT


# PEFT compares class names when a second parameter of the same module is wrapped (peft 0.21.2
# tuners/tuners_utils.py); under another name the second one is "not a valid target".
ExpertsLora.__name__ = "ParamWrapper"
