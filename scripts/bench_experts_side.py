"""One side of `bench_experts.py`: a process that loads a model and takes a training step whenever it is told to.

Started by `bench_experts.py` with a `Spec` as JSON; reads commands as JSON lines and answers each with one. A process
of its own, so that its memory is that of one side only.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIDES = ("ours", "stock-bf16", "stock-4bit", "stock-fp32", "unsloth")
LEARNING_RATE = 1e-3
SPREAD_OF_B = 0.01
"""B starts at noise instead of zero: with zeros the first gradients of A are zero and would be equal by themselves."""

QUANTILES = {"most": 0, "10 %": 10, "25 %": 25, "50 %": 50, "75 %": 75, "least": 100}
"""Which experts are told how many tokens they got, counted from the most popular one."""


@dataclass(kw_only=True, slots=True)
class Spec:
    """What a side is: set by the parent, the same for both of a pair but for `side`."""

    side: str
    """One of `SIDES`."""
    folder: str
    """The checkpoint, the same files for all sides."""
    adapter: str
    """A PEFT folder: the first side that finds it absent (ours) writes it, and everybody starts from it."""
    fp32: bool
    """Nothing in 4 bits and everything in fp32: the part that compares losses."""
    text: bool
    """Rows are text of ours instead of random tokens."""
    length: int
    """Tokens of a row."""
    rank: int
    """LoRA rank of the attention; alpha is twice the rank."""
    expert_rank: int
    """LoRA rank inside each expert."""
    checkpointing: bool
    """Recompute activations in the backward pass (gradient checkpointing, not reentrant)."""
    steps: bool
    """Whether it will be asked for steps; if not, only bytes count, and ours loads as for bf16."""
    bf16: bool
    """Ours multiplies in bf16 even on a CPU without instructions for it, as stock does."""

    @property
    def in_fp32(self) -> bool:
        """Whether this side multiplies in fp32: ours where `train.precision=auto` would, stock only when told to."""
        from finetune.machine import multiplies_bf16

        ours = self.side == "ours" and self.steps and not self.bf16 and not multiplies_bf16()
        return self.fp32 or self.side == "stock-fp32" or ours


class Side:
    """A loaded model that can be stepped and measured. Methods named in `COMMANDS` return plain values."""

    def __init__(self, spec: Spec) -> None:
        if spec.side == "unsloth":
            import unsloth  # noqa: F401  # it changes transformers, so it must be imported before that
        import torch
        from transformers import AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        import finetune.adapters  # noqa: F401  # imported now, so that loading is charged for weights only
        from finetune.base import read_config

        self.spec, self.torch = spec, torch
        self.on_gpu = torch.cuda.is_available()
        self.family, self.config = read_config(Path(spec.folder))
        MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]  # imports the model's module, for the same reason
        self.tokenizer = AutoTokenizer.from_pretrained(spec.folder)  # what a tokenizer takes is not a matter of weights
        gc.freeze()  # modules stay: collecting looks at what comes after

    def load(self) -> dict[str, Any]:
        """Loads base and adapter: bytes resident, and the highest memory on the way."""
        torch = self.torch
        torch.manual_seed(0)
        gc.collect()
        before, started = anonymous_bytes(), time.monotonic()
        with Peak() as peak:
            base, adapt = LOADERS[self.spec.side](self.spec)
        seconds = time.monotonic() - started
        gc.collect()
        after = anonymous_bytes()
        experts = [m for path, m in base.named_modules() if path.endswith("." + self.family.experts)]
        answer = {
            "resident_bytes": sum(sizes(base).values()),
            "expert_bytes": sum(sum(sizes(module).values()) for module in experts),
            "load_peak_bytes": peak.bytes - before,
            "process_grew_bytes": after - before,
            "load_peak_device_bytes": torch.cuda.max_memory_allocated() if self.on_gpu else None,
            "load_seconds": round(seconds, 2),
            "in_fp32": self.spec.in_fp32,
            "threads": torch.get_num_threads(),
        }
        self.model = adapt()
        self.model.train()
        if self.spec.checkpointing and self.spec.side != "unsloth":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        answer["trained_parameters"] = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.device = trained[0].device
        if self.spec.text:
            from finetune.tiny import PROSE

            self.text = torch.tensor(self.tokenizer(PROSE)["input_ids"])
        return answer

    def route(self, routing: str) -> dict[str, Any]:
        """Sets how popular experts are; `own` leaves the router as it is. Starts a new peak of memory."""
        from bench_experts_shape import set_routing

        if routing != "own":
            set_routing(self.model, self.family.router, routing)
        gc.collect()
        self.peak = Peak()
        if self.on_gpu:
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
        self.went_to_sleep = time.process_time()
        return {}

    def step(self, number: int, tokens: int) -> dict[str, Any]:
        """One training step: its seconds and its loss, and what the process did since the step before."""
        asleep = time.process_time() - self.went_to_sleep
        ids = self.batch(number, tokens)
        with self.peak:
            self.wait()
            started = time.perf_counter()
            loss = self.forward(ids)
            self.backward(loss)
            self.wait()
            seconds = time.perf_counter() - started
        value = loss.item()
        self.went_to_sleep = time.process_time()
        return {"seconds": seconds, "loss": value, "cpu_seconds_asleep": asleep}

    def peaks(self) -> dict[str, Any]:
        """Highest memory of the steps since `route`, and of the process."""
        device = self.torch.cuda.max_memory_allocated() if self.on_gpu else None
        return {
            "step_peak_bytes": device if self.on_gpu else self.peak.bytes,
            "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def count(self, number: int, tokens: int) -> dict[str, Any]:
        """A step that is not timed: what it saves for the backward pass, what it dequantises, how it routes."""
        torch = self.torch
        kept = {tensor.untyped_storage().data_ptr() for tensor in tensors(self.model)}
        saved: dict[int, int] = {}
        routed: list[list[int]] = []

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in kept:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def note(module: Any, inputs: Any, output: Any) -> None:
            chosen = output[-1].reshape(-1)
            routed.append(torch.bincount(chosen, minlength=module.weight.shape[0]).sort(descending=True)[0].tolist())

        routers = [m for path, m in self.model.named_modules() if path.endswith("." + self.family.router)]
        hooks = [module.register_forward_hook(note) for module in routers]
        ids = self.batch(number, tokens)
        with counter() as dequantised:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self.forward(ids)
            for hook in hooks:  # before the backward pass: checkpointing would run the routers again
                hook.remove()
            self.backward(loss)
        self.went_to_sleep = time.process_time()
        loads = [sum(layer) / len(routed) for layer in zip(*routed, strict=True)]  # of the layers, by popularity
        return {
            "loss": loss.item(),
            "saved_tensor_bytes": sum(saved.values()),
            "dequantisations": sum(n for name, n in dequantised.calls.items() if "dequantize" in name),
            "dequantised_parameters": dequantised.parameters,
            "calls_on_4bit": dict(dequantised.calls),
            "tokens_per_expert": {name: round(loads[at * (len(loads) - 1) // 100]) for name, at in QUANTILES.items()},
            "experts_without_tokens": sum(layer.count(0) for layer in routed) / len(routed),
        }

    def batch(self, number: int, tokens: int) -> Any:
        """The rows of step `number`: the same on every side."""
        torch, length = self.torch, self.spec.length
        generator = torch.Generator().manual_seed(number)
        if self.spec.text:
            first = torch.randint(len(self.text), (tokens // length, 1), generator=generator)
            ids = self.text[(first + torch.arange(length)) % len(self.text)]
        else:
            ids = torch.randint(self.config.vocab_size, (tokens // length, length), generator=generator)
        return ids.to(self.device)

    def forward(self, ids: Any) -> Any:
        """The loss of a batch, in the arithmetic that the trainer uses: bf16 autocast, or fp32."""
        arithmetic = nullcontext() if self.spec.in_fp32 else self.torch.autocast(self.device.type, self.torch.bfloat16)
        with arithmetic:
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def backward(self, loss: Any) -> None:
        """The rest of a step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            self.torch.cuda.synchronize()


def load_ours(spec: Spec) -> tuple[Any, Callable[[], Any]]:
    """(our base, a function that adapts it)."""
    import torch

    from finetune.adapters import attach, load_adapter
    from finetune.base import load_base
    from finetune.recipe import Adapter

    base = load_base(Path(spec.folder), load_in_4bit=not spec.fp32, precision="fp32" if spec.in_fp32 else "bf16")
    settings = Adapter(
        targets="experts",
        rank=spec.rank,
        alpha=2.0 * spec.rank,
        expert_rank=spec.expert_rank,
        expert_alpha=2.0 * spec.expert_rank,
    )

    def adapt() -> Any:
        if Path(spec.adapter).is_dir():
            return load_adapter(base, Path(spec.adapter), trainable=True)
        model = attach(base, settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, SPREAD_OF_B)
        model.save_pretrained(spec.adapter, save_embedding_layers=False)
        return model

    return base.model, adapt


def load_stock(spec: Spec) -> tuple[Any, Callable[[], Any]]:
    """(the base as transformers loads it, a function that adapts it as PEFT does)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arithmetic = torch.float32 if spec.in_fp32 else torch.bfloat16
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arithmetic)
    model = AutoModelForCausalLM.from_pretrained(
        spec.folder,
        dtype=arithmetic,
        use_safetensors=True,
        **({"quantization_config": packed} if spec.side == "stock-4bit" else {}),
        **({"device_map": {"": "cuda"}} if torch.cuda.is_available() else {}),
    )
    model.requires_grad_(False)
    return model, lambda: PeftModel.from_pretrained(model, spec.adapter, is_trainable=True)


def load_unsloth(spec: Spec) -> tuple[Any, Callable[[], Any]]:
    """(the base as Unsloth loads it, a function that adapts it). Its adapter is its own: one rank, new noise."""
    from unsloth import FastModel

    model, _ = FastModel.from_pretrained(spec.folder, load_in_4bit=True, max_seq_length=spec.length)
    return model, lambda: FastModel.get_peft_model(
        model,
        r=spec.expert_rank,
        lora_alpha=2 * spec.expert_rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0,
        use_gradient_checkpointing="unsloth" if spec.checkpointing else False,
    )


LOADERS = {"ours": load_ours, "unsloth": load_unsloth} | dict.fromkeys(SIDES[1:4], load_stock)


def sizes(model: Any) -> dict[int, int]:
    """Address -> bytes of every tensor that a model keeps: parameters, buffers, and what bitsandbytes keeps beside."""
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors(model)}


def tensors(model: Any) -> Iterator[Any]:
    """Every tensor that a model keeps, some perhaps twice."""
    import bitsandbytes as bnb

    for parameter in (*model.parameters(), *model.buffers()):
        yield parameter
        if isinstance(parameter, bnb.nn.Params4bit) and parameter.quant_state is not None:
            yield from (parameter.quant_state.absmax, parameter.quant_state.code)


def counter() -> Any:
    """A context that counts the calls of operators on 4-bit weights, and the numbers that dequantisation gives."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dequantisations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()
            self.parameters = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            result = func(*args, **given)
            if "4bit" in func.name() or "dequantize" in func.name():
                self.calls[func.name()] += 1
            if "dequantize" in func.name():
                written = result if isinstance(result, torch.Tensor) else given["out"]
                self.parameters += written.numel()
            return result

    return Dequantisations()


class Peak:
    """Highest anonymous memory of this process while inside the block, over all its uses, in bytes; every 5 ms."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes())
            if self._stop.wait(0.005):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """What this process has allocated and holds in memory, without files that it maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


COMMANDS = ("load", "route", "step", "peaks", "count")


def serve(spec: Spec) -> None:
    """Answers commands until there are no more. An error is an answer too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    side = Side(spec)
    for line in sys.stdin:
        words = json.loads(line)
        command = words.pop("command")
        assert command in COMMANDS, command
        try:
            answer = getattr(side, command)(**words)
        except Exception as error:
            import traceback

            traceback.print_exc()
            gc.collect()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


def as_json(spec: Spec) -> str:
    """A spec as the one word that a child process is started with."""
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    serve(Spec(**json.loads(sys.argv[1])))
