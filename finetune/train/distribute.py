"""Several processes of one training through Accelerate: joining them, and the proof that they did join."""

from __future__ import annotations

import os
from typing import Any

from finetune.errors import RunError
from finetune.families import Family
from finetune.ranks import Ranks, expected
from finetune.recipe import Recipe


def join(recipe: Recipe) -> Ranks:
    """This process among those of the launcher. Raises RunError (LCH-004) when there are other ones than asked for."""
    _, world = expected()
    planned = recipe.launch.nodes * recipe.launch.devices
    if world not in (1, planned) or (world == 1 and planned > 1):
        raise RunError(
            "LCH-004",
            f"{world} processes were started, launch.nodes x launch.devices is {planned}",
            "each would train alone, or on other rows than planned",
            "python -m finetune run=PATH, which starts them; or one task per device in your own job",
        )
    if world == 1:
        return Ranks()
    import torch
    from accelerate import DistributedType, PartialState

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if is_divided(recipe):
        from finetune.train.zero import start

        state = start(on_gpu)
    else:
        state = PartialState(cpu=not on_gpu and not is_sharded(recipe))
    if state.num_processes != world or (is_sharded(recipe) and state.distributed_type != DistributedType.MULTI_GPU):
        raise _apart(world, (world, state.num_processes), state.distributed_type)
    return Ranks.here(recipe.launch.context_parallel)


def is_sharded(recipe: Recipe) -> bool:
    """Whether the base's weights are split among the processes."""
    return recipe.launch.distribution == "fsdp2" and recipe.launch.nodes * recipe.launch.devices > 1


def is_divided(recipe: Recipe) -> bool:
    """Whether gradients and optimizer states are divided among the processes (ZeRO), which all hold the whole base."""
    return recipe.launch.distribution == "deepspeed" and recipe.launch.nodes * recipe.launch.devices > 1


def sharding(family: Family) -> dict[str, Any]:
    """Accelerate's settings for FSDP2: one group of weights per decoder layer, given back after its forward pass."""
    return {
        "version": 2,
        "transformer_layer_cls_to_wrap": [family.block_class],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": True,
    }


def as_stored(trainer: Any) -> None:
    """Parts of weights travel in the type they are stored in: maxima and adapter stay fp32, gradients are summed so.

    Accelerate would cast everything to bf16, and the loss too; autocast casts where it does with one process.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def require_ranks(trainer: Any, recipe: Recipe, ranks: Ranks) -> None:
    """Nothing, or RunError (LCH-005) when trainer and accelerator do not train together as the recipe says.

    Accelerate can start two unrelated trainings, or one, without an error; three numbers tell (accelerate 1.15.0).
    """
    from accelerate import DistributedType

    seen = (expected()[1], trainer.args.world_size, trainer.accelerator.num_processes)
    together = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    plain = together if ranks.world > 1 else {DistributedType.NO}
    wanted = {DistributedType.FSDP} if is_sharded(recipe) else plain
    wanted = {DistributedType.DEEPSPEED} if is_divided(recipe) else wanted
    kind = trainer.accelerator.distributed_type
    if set(seen) != {ranks.world} or kind not in wanted:
        raise _apart(ranks.world, seen, kind)


def _apart(world: int, seen: tuple[int, ...], kind: Any) -> RunError:
    return RunError(
        "LCH-005",
        f"{world} processes were to train together; environment and libraries say {seen}, {kind}",
        "they would train apart, or hold the whole base each",
        "launch.devices=1, or launch.distribution=ddp",
    )
