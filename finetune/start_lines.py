"""How each server is started: `command(server, order)` gives its command line, `environment(...)` what it sees."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune.asking import Endpoint
from finetune.errors import ServerError

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "LLAMA_OFFLINE": "1",
    "LLAMA_ARG_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""What a server sees beside the offline switches of `finetune/__init__.py`, which are in our own environment."""
VLLM_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""What vLLM's build for CPUs needs where memory is small and cores are shared; the environment overrules it."""
WORDS_ON_CPU = ("--enforce-eager", "--max-num-seqs", "4")
"""Words of its command line, for the same reason."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY", "FINETUNE_API_KEY")
"""What a server has no use for."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
BASE = "base"
"""Name of the base that vLLM serves beside an adapter."""
STARTS = {
    "gguf": "`gguf/` is for llama.cpp: `llama-server --model gguf/FILE.gguf --host 127.0.0.1 --offline`.",
    "ollama": "`ollama/` is for Ollama: `cd ollama && ollama create NAME -f Modelfile`.",
    "vllm": "`vllm/start.sh` serves `hf/` with vLLM, on this machine alone: `PYTHON=/its/bin/python sh vllm/start.sh`.",
    "peft_per_expert": (
        "`peft_per_expert/` is the adapter for servers that want a pair of matrices per expert, beside the base: "
        "`--enable-lora --lora-modules NAME=peft_per_expert` of vLLM, `--lora-paths` of SGLang."
    ),
}
"""Format -> how it is started."""
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is installed."""

    name: str
    """vllm, llama.cpp or transformers."""
    version: str
    """Version of its package, or what its program says of itself."""
    program: str
    """The Python it is in, or llama.cpp's program."""
    package: str
    """The package it comes in; empty for a program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a server is to serve, and where."""

    model: Path
    """A transformers folder; for llama.cpp a GGUF file or a folder with one."""
    adapter: Path | None = None
    """A PEFT folder; for llama.cpp a GGUF file."""
    port: int
    """Port on 127.0.0.1."""
    name: str = ""
    """What the model is called; the name of its folder where this is empty."""
    dtype: str = "auto"
    """Arithmetic of vLLM and transformers: auto, float32, bfloat16."""
    context: int = 0
    """Longest conversation in tokens; 0 is the server's own choice."""
    api_key: str = ""
    """The key that the server asks for, if any."""


def command(server: Server, order: Order) -> tuple[list[str], Endpoint]:
    """The command line of a server, and where it will answer. Raises ServerError (SRV-004) for what it cannot serve."""
    model = order.model.resolve()
    endpoint = Endpoint(f"http://127.0.0.1:{order.port}/v1", order.name or model.stem, server.name)
    if server.name == "llama.cpp":
        return _llama_cpp(server, order, endpoint.model), endpoint
    if not (model / "config.json").is_file():
        what = f"{server.name} cannot take {model}"
        raise ServerError("SRV-004", what, "it is no folder with a config.json", "the folder export/hf of a run")
    place = ["--host", "127.0.0.1", "--port", str(order.port), "--dtype", order.dtype]
    if server.name == "vllm":
        return [*_vllm(server, order, endpoint.model), *place], endpoint
    refuse(order)
    words = [server.program, "-m", "transformers.cli.transformers", "serve", str(model), *place]
    return words, Endpoint(endpoint.url, str(model), server.name)


def _llama_cpp(server: Server, order: Order, name: str) -> list[str]:
    """llama.cpp's program and our runner of the package have the same words but for two."""
    model = gguf_file(order.model)
    if server.package:
        words = [server.program, str(HERE / "llama_cpp_runner.py"), str(model), "--alias", name]
    else:
        words = [server.program, "--model", str(model), "--alias", name, "--host", "127.0.0.1"]
    words += ["--port", str(order.port)]
    if order.adapter:
        words += ["--lora", str(gguf_file(order.adapter))]
    if order.context:
        words += ["--ctx-size", str(order.context)]
    return words


def _vllm(server: Server, order: Order, name: str) -> list[str]:
    words = [server.program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(order.model.resolve())]
    words += ["--served-model-name", BASE if order.adapter else name]
    if server.package == "vllm-cpu":
        words += WORDS_ON_CPU
    if order.context:
        words += ["--max-model-len", str(order.context)]
    if order.adapter:
        words += ["--enable-lora", "--lora-modules", f"{name}={order.adapter.resolve()}"]
        words += ["--max-lora-rank", str(_lora_rank(order.adapter))]
    return words


def refuse(order: Order) -> None:
    """Nothing, or ServerError (SRV-004) for what `transformers serve` cannot do."""
    what = why = fix = ""
    if order.adapter:
        what, why, fix = "cannot add an adapter", "it serves one model as it is", "the merged folder export/hf"
    elif order.api_key:
        what, why = "takes no key", "anybody on this machine could ask it"
        fix = "with=vllm, or unset FINETUNE_API_KEY"
    elif "@" in str(order.model.resolve()):
        what, why = f"cannot take {order.model.resolve()}", "it reads what follows an @ as a revision"
        fix = "a folder without @ in its path"
    if what:
        raise ServerError("SRV-004", f"transformers serve {what}", why, fix)


def gguf_file(path: Path) -> Path:
    """The GGUF file at a path: itself, or the first of a folder (of a file in parts, its first part)."""
    path = path.resolve()
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if not files:
        what = f"llama.cpp cannot take {path}"
        raise ServerError("SRV-004", what, "it is no .gguf file, nor a folder with one", "export.formats=[hf, gguf]")
    return files[0]


def _lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM makes room for and that holds all of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    pattern = config["rank_pattern"] if "rank_pattern" in config else None
    rank = max([config["r"], *(pattern or {}).values()])
    fitting = [room for room in LORA_RANKS if room >= rank]
    if not fitting:
        what = f"vLLM cannot take an adapter of rank {rank}"
        raise ServerError("SRV-004", what, f"its limit is {LORA_RANKS[-1]}", "the merged folder export/hf")
    return fitting[0]


def environment(server: Server, order: Order) -> dict[str, str]:
    """Our own environment, offline and quiet, without what a server has no use for."""
    seen = dict(os.environ) if server.program == sys.executable else foreign()
    seen = {name: value for name, value in seen.items() if name not in SECRETS} | QUIET
    if server.package == "vllm-cpu":
        seen = VLLM_ON_CPU | seen
    if "OMP_NUM_THREADS" in seen:
        seen.setdefault("LLAMA_ARG_THREADS", seen["OMP_NUM_THREADS"])
    if order.api_key:
        names = {"vllm": "VLLM_API_KEY", "llama.cpp": "FINETUNE_API_KEY" if server.package else "LLAMA_API_KEY"}
        seen[names[server.name]] = order.api_key
    return seen


def foreign() -> dict[str, str]:
    """Our environment without what makes another Python look into ours."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
