"""Tiny checkpoints of every family, made once per session; bf16 as published ones are, or fp32 for exact sums."""

import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters import attach
from finetune.base import load_base
from finetune.families import FAMILIES
from finetune.recipe import Adapter
from finetune.tiny import write_tiny

_ROOT = tempfile.TemporaryDirectory(prefix="finetune-tiny-")


def checkpoint(family: str, fp32: bool = False) -> Path:
    """The folder of a tiny checkpoint."""
    folder = Path(_ROOT.name) / f"{family}{'-fp32' if fp32 else ''}"
    if folder.exists():
        return folder
    folder.mkdir()
    write_tiny(FAMILIES[family], folder, 0)
    if fp32:
        for shard in folder.glob("*.safetensors"):
            save_file({k: v.float() for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by its key on disk."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as handle:
            found |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return found


def some_ids(base, rows: int = 2, length: int = 19) -> torch.Tensor:
    """Token ids that the tokenizer has, none special."""
    return torch.randint(5, len(base.tokenizer) - 5, (rows, length), generator=torch.Generator().manual_seed(3))


def adapted(family: str, adapter: Adapter, *, fp32: bool = True, load_in_4bit: bool = False, precision: str = "fp32"):
    """(base, model) with an adapter whose B is not zero, so that mistakes in it show."""
    base = load_base(checkpoint(family, fp32), load_in_4bit=load_in_4bit, precision=precision)
    torch.manual_seed(5)
    model = attach(base, adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return base, model
