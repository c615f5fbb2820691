"""Full fine-tuning: the base's own weights are trained, and what is left is a folder of them, `tuned/`.

Values are kept in fp32 while they train, whatever the precision of the arithmetic: bf16 loses updates below 1/256 of a
weight, so autocast rounds copies of them, which is what Accelerate's mixed precision does. `tuned/` holds the trained
parameters by the names they have in memory, in fp32; `merge` puts them into the original checkpoint's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters import load_adapter
from finetune.base import Base, stored_bytes
from finetune.errors import AdapterError, NumbersError
from finetune.experts.stack import layout_of
from finetune.foreign import check_folder
from finetune.foreign.headers import HeaderError, read_header, read_index
from finetune.recipe import Adapter
from finetune.rundir import read_json, write_json
from finetune.shards import read_headers
from finetune.sizes import is_large, is_trained

TUNED = "tuned.json"
"""File of a tuned folder that says what it is."""
INDEX = "model.safetensors.index.json"


def exact_precision(folder: Path, precision: str) -> str:
    """The precision in which a base loads without a bit lost: `precision`, or fp32 where weights are not in bf16."""
    kinds = {entry.dtype for entry in read_headers(folder).values() if entry.dtype not in ("I64", "I32", "BOOL")}
    return precision if kinds <= {"BF16"} else "fp32"


def begin(base: Base, adapter: Adapter, precision: str) -> Any:
    """The base's model with the weights that the settings name trainable and in fp32; others stay frozen.

    Frozen linear maps and stacks are kept in `precision`. Raises NumbersError (ADP-010) when nothing is to be trained.
    """
    trained = 0
    for path, parameter in base.model.named_parameters():
        wanted = is_trained(path, base.family, adapter)
        frozen_small = precision == "bf16" and not wanted and is_large(base.family.group_of(path))
        parameter.data = parameter.data.to(torch.bfloat16 if frozen_small else torch.float32)
        parameter.requires_grad_(wanted)
        trained += wanted
    if not trained:
        raise NumbersError(
            "ADP-010", f"adapter.targets={adapter.targets} finds no weight", "", "a family file that names the layers"
        )
    base.resident_gib = sum(map(stored_bytes, [*base.model.parameters(), *base.model.buffers()])) / 2**30
    return base.model


def fingerprints(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> a number per expert of a stack, or one, that changes when a bit of a trained parameter does."""
    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rows = parameter.detach().reshape(experts_of(model, name) or 1, -1)
                found[name] = torch.hash_tensor(rows, dim=1).cpu()
    return found


def experts_of(model: nn.Module, name: str) -> int:
    """How many experts a parameter of an experts module stacks; 0 for any other parameter."""
    module = model.get_submodule(name.rpartition(".")[0])
    if not hasattr(module, "finetune_layout"):
        return 0
    experts: int = next(iter(layout_of(module).shapes.values()))[0]
    return experts


def save(folder: Path, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes trained parameters by name into `folder`, in files of at most 5 GB, and `tuned.json` beside them."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: w.contiguous() for name, w in weights.items()}, folder, max_shard_size="5GB")
    parameters = sum(weight.numel() for weight in weights.values())
    write_json(folder / TUNED, {"schema": 1, "tensors": sorted(weights), "parameters": parameters} | about)


def is_tuned(folder: Path) -> bool:
    """Whether a folder holds trained weights of a base, rather than an adapter."""
    return (folder / TUNED).is_file()


def read(folder: Path) -> dict[str, Callable[[int | None], torch.Tensor]]:
    """Name -> a function that reads a trained parameter of a tuned folder: one expert of it, or (None) all.

    Raises AdapterError (ADP-018) when the files do not hold exactly the weights that `tuned.json` lists.
    """
    from safetensors import SafetensorError, safe_open

    check_folder(folder, AdapterError)
    try:
        names = [str(name) for name in read_json(folder / TUNED)["tensors"]]
        files = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
        files = files or dict.fromkeys(names, "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{TUNED} or {INDEX} cannot be read ({type(error).__name__})") from None
    except HeaderError as error:
        raise _damaged(folder, str(error)) from None
    readers: dict[str, Any] = {}
    try:
        for file in sorted(set(files.values())):
            read_header(folder / file)
            readers[file] = safe_open(folder / file, "pt")
        held = {key for reader in readers.values() for key in reader.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError, HeaderError) as error:
        raise _damaged(folder, str(error)) from error
    if odd := held ^ set(names) or held - set(files):
        raise _damaged(folder, f"{len(odd)} weights are on one side only, e.g. {min(odd)}")

    def reader(name: str) -> Callable[[int | None], torch.Tensor]:
        whole = readers[files[name]].get_slice(name)
        return lambda expert: whole[...] if expert is None else whole[expert]

    return {name: reader(name) for name in names}


def _damaged(folder: Path, why: str) -> AdapterError:
    return AdapterError("ADP-018", f"{folder} does not hold the weights it lists", why, "a copy that verifies")


def load_trained(base: Base, folder: Path) -> Any:
    """The base as training left it: with the adapter in `folder`, or with its own weights replaced by those there.

    Either way `model.disable_adapter()` is the context in which the model is its base again. Raises AdapterError.
    """
    return load_tuned(base, folder) if is_tuned(folder) else load_adapter(base, folder)


def load_tuned(base: Base, folder: Path) -> Tuned:
    """The base with the weights of a tuned folder in the base's own types. Raises AdapterError (ADP-018, ADP-019)."""
    parameters = dict(base.model.named_parameters())
    others: dict[str, torch.Tensor] = {}
    for name, value in read(folder).items():
        tensor = value(None)
        if name not in parameters or parameters[name].shape != tensor.shape:
            have = tuple(parameters[name].shape) if name in parameters else "not there"
            what = f"{folder}: {name} is {tuple(tensor.shape)}, in the base {have}"
            raise AdapterError("ADP-019", what, "these weights are of another base", "the base they were trained from")
        others[name] = tensor.to(parameters[name].dtype)
    model = Tuned(base.model, others)
    model.exchange()
    return model.eval()


class Tuned(nn.Module):
    """A model with two sets of some of its weights: the trained ones, and within `disable_adapter()` the base's.

    The set that is not at work lies in host memory.
    """

    def __init__(self, model: nn.Module, others: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self._others = model, others

    def exchange(self) -> None:
        """Puts the other set to work."""
        parameters = dict(self.model.named_parameters())
        for name, other in self._others.items():
            parameter = parameters[name]
            self._others[name], parameter.data = parameter.data.to(other.device), other.to(parameter.device)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def get_base_model(self) -> nn.Module:
        """The transformers model itself."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
