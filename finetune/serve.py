"""The export of a run on a server of this machine, until Ctrl-C: `serve(run_dir, say)`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.canary import KEY
from finetune.errors import ServerError
from finetune.machine import available_gib, multiplies_bf16
from finetune.rundir import RunDir
from finetune.servers import NAMES, Endpoint, Server, choose, found, said, started, stopped

PRECISE_FIRST = ("f32", "bf16", "f16", "q8_0")
"""Of several GGUF files the first of these is served: the nearest to what was trained."""


def serve(run_dir: RunDir, say: Callable[[str], None], *, name: str = "", port: int = 8000) -> None:
    """Serves export/ on 127.0.0.1 with the best server at hand, or the one named, until Ctrl-C or SIGTERM.

    `say` gets the address, the model's name and what to type. Raises ServerError: SRV-001 nothing is installed, SRV-015
    the export has nothing for it, SRV-016 the server ended by itself, and what `started` raises.
    """
    run_dir.require(run_dir.export, "export")
    server, model = _fitting(run_dir, name)
    log = run_dir.logs / "serve.log"
    key = os.environ[KEY] if KEY in os.environ else ""
    dtype = arithmetic(server, model)
    how = "" if dtype == "auto" else f" in {dtype}, for want of instructions for bf16"
    say(f"{server.name} {server.version} loads {model}{how} (log: {log}) ...")
    with (
        _ended_by_sigterm(),
        started(server, model, port=port, log=log, name=run_dir.path.parent.name, dtype=dtype, api_key=key) as endpoint,
    ):
        say(told(run_dir, endpoint, key))
        while not stopped(endpoint):
            time.sleep(0.3)
        raise ServerError("SRV-016", f"{server.name} ended by itself", said(log), f"cat {log}")


def told(run_dir: RunDir, endpoint: Endpoint, key: str = "") -> str:
    """What a person needs to know of a server that is ready."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": "..."}], "temperature": 0}
    header = f' -H "Authorization: Bearer ${KEY}"' if key else ""
    words = shlex.quote(json.dumps(body))
    named = f" model={endpoint.model}" if endpoint.kind == "transformers" else ""  # it lists others, too
    return "\n".join(
        [
            f"ready: {endpoint.url}, on this machine only; model: {endpoint.model}",
            f"ask it:   curl {endpoint.url}/chat/completions{header} -H 'Content-Type: application/json' -d {words}",
            f"prove it: python -m finetune verify serve={endpoint.url} run={shlex.quote(str(run_dir.path))}{named}",
            "Ctrl-C ends it.",
        ]
    )


def arithmetic(server: Server, model: Path) -> str:
    """float32 where products in bf16 are many times slower and memory is enough, else auto: the type of the files."""
    if server.name == "llama.cpp" or multiplies_bf16():
        return "auto"
    size_gib = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**30
    return "float32" if 3 * size_gib < available_gib() else "auto"


def gguf_of(run_dir: RunDir) -> Path | None:
    """The most precise GGUF file of an export, or none."""
    files = sorted((run_dir.export / "gguf").glob("*.gguf"))
    for format_ in PRECISE_FIRST:
        for file in files:
            if format_ in file.stem.lower().replace("-", ".").split("."):
                return file
    return files[0] if files else None


def _fitting(run_dir: RunDir, name: str) -> tuple[Server, Path]:
    """(server, what it loads): the best server for which the export has something."""
    servers = [choose(name)] if name else found() or [choose()]
    for server in servers:
        model = gguf_of(run_dir) if server.name == "llama.cpp" else run_dir.export / "hf"
        if model and model.exists():
            return server, model
    what = f"{run_dir.export} has nothing that {' or '.join(server.name for server in servers)} loads"
    why = "vllm and transformers load export/hf, llama.cpp a file of export/gguf"
    raise ServerError(
        "SRV-015", what, why, f"export.formats=[hf, gguf] in a new run, or with= one of {', '.join(NAMES)}"
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does, so that the server is ended and not left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
