"""The frozen base: `load_base` gives the model in 4 bits, its tokenizer and its family."""

from __future__ import annotations

import json
import logging
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import collecting
from finetune.errors import WeightsError
from finetune.families import Family, family_of
from finetune.foreign import check_folder
from finetune.ranks import Part
from finetune.shards import check_shards as check_shards  # for merge
from finetune.shards import quantisation_of, weights_of

STRAY = re.compile(r"(language_model\.)?(model\.)?(language_model\.)?layers\.\d+\.")


@dataclass(slots=True)
class Base:
    """A loaded base model."""

    model: Any
    """The transformers model, frozen, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    family: Family
    """Its grammar."""
    folder: Path
    """Where its files are."""
    load_seconds: float
    """How long loading took."""
    load_peak_gib: float
    """How much the process grew while loading, at most, in GiB: memory it allocated, without mapped files."""
    largest_group_gib: float
    """The largest group of checkpoint tensors that make one parameter (an expert stack, or the embedding), in GiB on
    disk; 0 without 4 bits."""
    resident_gib: float
    """Bytes of parameters and buffers, 4-bit maxima included, in GiB."""

    def loading(self) -> str:
        """What loading took, as a line a person can check."""
        limit = self.resident_gib + 2 * self.largest_group_gib
        return (
            f"base: {self.resident_gib:.3f} GiB in memory after {self.load_seconds:.1f} s; at most "
            f"{self.load_peak_gib:.3f} GiB while loading (weights + 2 x the largest group of tensors = {limit:.3f} GiB)"
        )

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The context for a forward pass outside training.

        Families that keep some weights in fp32 beside bf16 ones need autocast there, as training has it.
        """
        import torch

        if self.family.mixed_dtypes and self.model.dtype == torch.bfloat16:
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return nullcontext()


def load_base(
    folder: Path, *, load_in_4bit: bool, precision: str, double_quantisation: bool = False, part: Part | None = None
) -> Base:
    """The model in `folder`, frozen: linear maps and expert stacks in NF4, or everything in `precision`.

    `precision` is `bf16` or `fp32`, the type of the arithmetic. `double_quantisation` stores the maxima of NF4 in 8
    bits; `part` reads only that part of each expert stack, for FSDP2 (`train.distribute` puts it in its place), and
    keeps the packed bits of linear maps under a floating type, which is what FSDP2 splits. Checkpoints in bf16, fp16,
    fp32, fp8 and mxfp4 are read. Raises WeightsError when files are missing, damaged, or do not fit the config.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity

    disable_progress_bar()
    verbosity = get_verbosity()
    set_verbosity(logging.CRITICAL)  # transformers prints a report with tracebacks; what is wrong is said below
    from finetune.experts import EXPERTS, SCRATCH, Nf4Config, prepare_experts

    SCRATCH.release()  # what it holds belongs to the model before
    started = time.monotonic()
    family, config = read_config(folder)
    weights = weights_of(folder, quantisation_of(config.to_dict()), mapped=not load_in_4bit)
    forget_quantisation(config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    nf4 = Nf4Config(family, weights, compute_dtype=dtype, double_quantisation=double_quantisation, part=part)
    quantisation = {"quantization_config": nf4} if load_in_4bit else {}
    place = {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
    kind, config = model_class(family, config)
    before = resident_gib()
    collecting.as_usual()
    try:
        with Peak() as peak:
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                experts_implementation=EXPERTS if family.experts else None,
                output_loading_info=True,
                **quantisation,
                **place,
            )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        why = nf4.problems[0] if nf4.problems else _first_line(error)
        raise WeightsError(
            "WGT-004", f"cannot load {folder}", why, "the files that belong to this config.json"
        ) from error
    finally:
        set_verbosity(verbosity)
        nf4.weights = None  # transformers keeps this object with the model, and it would keep the files open
    # A key that no layer of the text model has is a weight that would not be used; vision parts may stay unused.
    strays = [key for key in info["unexpected_keys"] if STRAY.match(key)]
    wrong = {"missing": info["missing_keys"], "mismatched": info["mismatched_keys"], "unexpected": strays}
    for what, keys in wrong.items():
        if keys:
            some = ", ".join(sorted(map(str, keys))[:3])
            raise WeightsError(
                "WGT-005",
                f"{folder}: {len(keys)} {what} keys, e.g. {some}",
                "the weights are not those that config.json describes",
                "fetch the folder again",
            )
    if not load_in_4bit:
        prepare_experts(model, family)
    _keep_cpu_layout(model)
    model.requires_grad_(False).eval()
    name_after(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Base(
        model=model,
        tokenizer=tokenizer,
        family=family,
        folder=folder,
        load_seconds=time.monotonic() - started,
        load_peak_gib=peak.gib - before,
        largest_group_gib=nf4.largest_group / 2**30,
        resident_gib=sum(map(stored_bytes, [*model.parameters(), *model.buffers()])) / 2**30,
    )


def stored_bytes(tensor: Any) -> int:
    """Bytes of a parameter or buffer in memory, with the maxima that bitsandbytes keeps beside a packed one."""
    state = getattr(tensor, "quant_state", None)
    beside = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(t.numel() * t.element_size() for t in (tensor, *beside))


def forget_quantisation(config: Any) -> None:
    """Takes the checkpoint's quantisation out of a config: its weights come as plain numbers (`weights_of`)."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def name_after(model: Any, folder: Path) -> None:
    """Tells the model which folder it is from, and gives it that folder's settings for generation."""
    from transformers import GenerationConfig

    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def read_config(folder: Path) -> tuple[Family, Any]:
    """(family, transformers config of the text model) of a checkpoint folder. Raises WeightsError.

    Nothing in the folder is opened by a library before `foreign.check_folder` has looked at it.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            "WGT-001", f"{folder} has no config.json", "it is not a model folder", "model.source=/folder/of/the/model"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        family = family_of(values)
        check_folder(folder, WeightsError)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except WeightsError:
        raise
    except Exception as error:  # what transformers makes of a stranger's settings raises of every kind
        raise WeightsError("WGT-002", f"{path} cannot be used", _first_line(error), "fetch the folder again") from error
    return family, config


def model_class(family: Family, config: Any) -> tuple[Any, Any]:
    """(model class, its config) as the family's auto class would choose them; auto classes cannot load without a path.

    A multimodal config leads to its text part where the class is one for text.
    """
    import transformers

    tables = {
        "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForImageTextToText": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    kind = tables[family.auto_class][type(config)]
    text = config.get_text_config()
    return kind, text if text is not config and kind.config_class is type(text) else config


def _keep_cpu_layout(model: Any) -> None:
    """On CPUs with AVX512-BF16 an evaluation repacks a Linear4bit weight for a kernel without autograd, and later
    training steps lose their input gradients (bitsandbytes 0.50.2, nn/modules.py). The switch is the layer's own.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


class Peak:
    """Highest resident memory of this process inside the block, in GiB (sampled every 20 ms)."""

    def __enter__(self) -> Peak:
        import threading

        self.gib, self._stop = resident_gib(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.gib = max(self.gib, resident_gib())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_gib() -> float:
    """Anonymous resident memory of this process in GiB: what it allocated, without files it merely maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
