"""ZeRO by DeepSpeed: gradients and optimizer states of what is trained, divided among the processes; the base is not.

The only file that imports DeepSpeed (0.19.8). Its launcher, its own checkpoints, which are pickles, its monitors and
its compiled operations are not used.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from finetune.errors import RunError
from finetune.machine import deepspeed_absent
from finetune.memory import BUCKET
from finetune.progress import require_gradients
from finetune.recipe import Train
from finetune.train import state as states


def start(on_gpu: bool) -> Any:
    """Accelerate's state of processes that DeepSpeed has joined. Raises RunError (LCH-011) when it is not installed."""
    if missing := deepspeed_absent():
        code, _, sentence = missing.partition(" ")
        raise RunError(code, sentence)
    from accelerate import PartialState

    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"  # else it looks for one, and says what it found
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # Said by torch 2.13.0 about DeepSpeed 0.19.8. Remove with a release that calls all_gather_single.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    if not on_gpu:
        _compile_nothing()
    return PartialState() if on_gpu else PartialState(backend="gloo")


def _compile_nothing() -> None:
    """On a CPU DeepSpeed would compile a sum over shared memory when it starts, which takes minutes; gloo has one."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Plain(CPU_Accelerator):
        """A CPU without operations of DeepSpeed's own."""

        def create_op_builder(self, op_name: str) -> None:
            """None: no operation is built."""

    set_accelerator(Plain())


def settings(train: Train) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO stage 2 in fp32. Everything that Accelerate would take from elsewhere is stated."""
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": "none"},
        },
        "bf16": {"enabled": False},  # what is trained is fp32; autocast casts where it does with one process
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }


class Zero(DeepSpeedEngineWrapper):
    """Accelerate's handle on the engine, which updates the weights within the last backward pass of an update.

    Between the two the gradients can be looked at; in a rehearsal there is no update.
    """

    def __init__(self, engine: Any, model: Any, begun: bool) -> None:
        super().__init__(engine)
        self.model = model
        self.rehearsing = False
        self._heard = begun

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Gradients of a loss, and the update with those since the last one if this pass ends it.

        Raises NumbersError (TRN-001), on all ranks and before the first update, when no gradient reaches a weight.
        """
        from deepspeed.utils import safe_get_full_grad

        last = sync_gradients and not self.rehearsing
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss, **kwargs)
        if not last:
            return
        if not self._heard:
            require_gradients(self.model, safe_get_full_grad)
            self._heard = True
        self.engine.step()

    def forget(self) -> None:
        """Drops the gradients since the last update."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.engine.optimizer.all_grad_tensors.clear()

    def memory(self) -> dict[str, Any]:
        """The optimizer's state of this rank's part."""
        return states.optimizer_state(self.engine.optimizer.optimizer)

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes up what `memory` gave. The weights must be there already: this rank's part of them is copied."""
        self.engine.optimizer.refresh_fp32_params()
        states.restore_optimizer(self.engine.optimizer.optimizer, memory)
