"""`python -m tests.fsdp_on_cpu STAGE RUN` is `python -m finetune.worker STAGE RUN` with FSDP2 over gloo on a CPU.

Accelerate 1.15.0 takes its FSDP way on GPUs only, and would silently train with DDP here. This changes two functions of
other libraries in this process: for tests, where nothing else can show that the sharded way is right.
"""

from __future__ import annotations

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import transformers.training_args
from accelerate import state

from finetune.worker import main


def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "gloo", state.DistributedType.MULTI_GPU
    return None, state.DistributedType.NO


state.PartialState._prepare_backend = _prepare_backend
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
