"""The fused kernel against plain products, for tests/test_products.py: run where Triton is, interpreted or on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from finetune.experts import fused, nf4
from tests.test_experts import experts_module


def main() -> None:
    """Compares; raises AssertionError when a product differs. Prints how many were compared."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = 0
    layouts = ((False, "gate_up_proj"), (False, "down_proj"), (True, "down_proj"))
    groups = ([3, 0, 40, 1], [0, 0, 0, 70], [32, 32, 32, 32])
    for (transposed, name), sizes, back, dtype in itertools.product(
        layouts, groups, (False, True), (torch.float32, torch.bfloat16)
    ):
        module = experts_module(torch.float32, packed=True).to(device)
        module.finetune_layout = replace(module.finetune_layout, transposed=transposed)
        assert fused.works(device, dtype), "the kernel cannot run here"
        shape = module.finetune_layout.shapes[name]
        stack = nf4.unpack(getattr(module, name), nf4.maxima(module, name), shape, torch.float32)
        weight_ENM = stack if transposed != back else stack.mT
        offsets = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
        rows = sum(sizes) + 5  # the last five belong to no expert
        x = torch.randn(rows, weight_ENM.shape[1], device=device).to(dtype)
        y = fused.product(x, module, name, offsets, back=back)
        start = 0
        for e, end in enumerate(offsets.tolist()):
            expected = x[start:end].float() @ weight_ENM[e].to(dtype).float()
            near = 1e-4 if dtype == torch.float32 else 2e-2
            difference = (y[start:end].float() - expected).norm()
            assert difference <= near * expected.norm(), (transposed, name, sizes, back, dtype, float(difference))
            start = end
        count += 1
    print(f"{count} products agree")
