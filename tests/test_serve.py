"""`serve run=PATH`: which server, which file of the export, what is printed, and that Ctrl-C ends it all.

The tier `-m serving` does it with vLLM, llama.cpp and `transformers serve` on a small real model, and asks them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from finetune import canary, serve
from finetune.__main__ import main
from finetune.errors import GateError, RunError, ServerError
from finetune.rundir import RunDir, write_json, write_text
from finetune.servers import NAMES, Server, started
from tests import serving_job
from tests.test_servers import gguf, program, runs, seen

__all__ = ["gguf", "program"]  # fixtures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose export has a transformers folder and two GGUF files."""
    run_dir = RunDir(tmp_path / "runs" / "law" / "0001")
    write_text(run_dir.recipe, "name: law\n")
    write_json(run_dir.export / "hf" / "config.json", {})
    for name in ("law-q4_k_m.gguf", "law-f16.gguf"):
        write_text(run_dir.export / "gguf" / name, "GGUF")
    return run_dir


def serving(run: RunDir, *words: str) -> tuple[subprocess.Popen[str], str]:
    """(process of `serve`, everything it printed until it was ready)."""
    command = [sys.executable, "-m", "finetune", "serve", f"run={run.path}", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background begin with it ignored
    )
    assert process.stdout is not None
    printed = ""
    while "Ctrl-C" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return process, printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_is_and_ends_with_the_server(program: Server, run: RunDir, number: signal.Signals) -> None:
    process, printed = serving(run, "port=0", "with=llama.cpp")
    url = re.search(r"ready: (http://127.0.0.1:\d+/v1), on this machine only; model: law", printed)[1]  # type: ignore[index]
    assert f"python -m finetune verify serve={url} run={run.path}\n" in printed
    curl = shlex.split(re.search(r"curl .*", printed)[0])  # type: ignore[index]
    assert curl[1] == f"{url}/chat/completions" and json.loads(curl[-1])["model"] == "law"
    with urllib.request.urlopen(f"{url}/models", timeout=5) as reply:
        assert json.load(reply)["data"][0]["id"] == "law"
    child = seen(run.export / "gguf" / "law-f16.gguf")["pid"]  # the most precise of the files
    assert runs(child)
    began = time.monotonic()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert (process.returncode, rest.strip()) == (0, "the server is ended.")
    assert not runs(child) and time.monotonic() - began < 15
    assert (run.logs / "serve.log").exists()


def test_a_server_that_ends_by_itself_ends_serve_with_its_last_words(program: Server, run: RunDir) -> None:
    process, _ = serving(run, "port=0", "with=llama.cpp")
    os.kill(seen(run.export / "gguf" / "law-f16.gguf")["pid"], signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 3 and rest.startswith("SRV-016 llama.cpp ended by itself: (ended with signal SIGKILL)")


def test_the_most_precise_gguf_file_is_served(run: RunDir) -> None:
    assert serve.gguf_of(run) == run.export / "gguf" / "law-f16.gguf"
    (run.export / "gguf" / "law-f16.gguf").unlink()
    assert serve.gguf_of(run) == run.export / "gguf" / "law-q4_k_m.gguf"
    (run.export / "gguf" / "law-q4_k_m.gguf").unlink()
    assert serve.gguf_of(run) is None


def test_a_run_that_is_not_exported_says_which_stage_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"RUN-002 .*python -m finetune export run="):
        serve.serve(RunDir(tmp_path), print)


def test_the_best_server_that_the_export_has_something_for_is_taken(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = [Server(name, "1", "/p", name) for name in ("vllm", "llama.cpp", "transformers")]
    monkeypatch.setattr(serve, "found", lambda: three)
    assert serve._fitting(run, "") == (three[0], run.export / "hf")
    monkeypatch.setattr(serve, "found", lambda: three[1:])
    assert serve._fitting(run, "") == (three[1], run.export / "gguf" / "law-f16.gguf")
    for path in (run.export / "gguf").iterdir():
        path.unlink()
    assert serve._fitting(run, "") == (three[2], run.export / "hf")
    monkeypatch.setattr(serve, "found", lambda: three[1:2])
    with pytest.raises(ServerError, match=r"SRV-015 .*nothing that llama.cpp loads.*export.formats=\[hf, gguf\]"):
        serve._fitting(run, "")


def test_a_cpu_without_bf16_serves_in_float32_where_memory_is_enough(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.export / "hf" / "model.safetensors").write_bytes(b"0" * 2**20)
    vllm, llama_cpp = Server("vllm", "1", "/p", "vllm"), Server("llama.cpp", "1", "/p", "")
    for has_bf16, gib, dtype in ((True, 9.0, "auto"), (False, 9.0, "float32"), (False, 0.002, "auto")):
        monkeypatch.setattr(serve, "multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr(serve, "available_gib", lambda gib=gib: gib)
        assert serve.arithmetic(vllm, run.export / "hf") == dtype
        assert serve.arithmetic(llama_cpp, run.export / "hf") == "auto"


@pytest.mark.parametrize(
    ("words", "code", "begin"),
    [
        (["port=eight"], 2, "CFG-010 port=eight is no port"),
        (["port=70000"], 2, "CFG-010 port=70000 is no port"),
        (["host=0.0.0.0"], 2, "CFG-010 serve: host= is not known here"),
        (["with=tgi"], 3, "SRV-001 with=tgi is no server"),
        (["with="], 2, "CFG-010 with= lacks its value"),
    ],
)
def test_wrong_words_are_told(
    run: RunDir, capsys: pytest.CaptureFixture[str], words: list[str], code: int, begin: str
) -> None:
    assert main(["serve", f"run={run.path}", *words]) == code
    assert capsys.readouterr().err.startswith(begin)


# --- real servers, a real model -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def installed() -> dict[str, Server]:
    """Every server, set up on a bare machine in a Python of their own."""
    return serving_job.servers()


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A small real run, trained, merged and ready to be served."""
    return serving_job.exported(tmp_path_factory.mktemp("served"))


@pytest.mark.serving
@pytest.mark.timeout(5400)  # the first one also installs, trains and converts
@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_served_and_known_as_the_tuned_model(
    installed: dict[str, Server], job: RunDir, name: str
) -> None:
    process, printed = serving(job, f"with={name}", "port=0")
    try:
        words = shlex.split(re.search(r"python -m finetune (verify .*)", printed)[1])  # type: ignore[index]
        done = subprocess.run([sys.executable, "-m", "finetune", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ": tuned; of 8 prompts" in done.stdout and (name == "transformers") == ("by words alone" in done.stdout)
        line = re.search(r"curl .*", printed)[0].replace('"..."', '"Which licence?"')  # type: ignore[index]
        reply = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True).stdout
        assert json.loads(reply)["choices"][0]["message"]["content"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0


@pytest.mark.serving
@pytest.mark.timeout(5400)  # the first one also installs, trains and converts
@pytest.mark.parametrize("name", NAMES)
def test_the_base_on_a_real_server_is_known_as_the_base(
    installed: dict[str, Server], job: RunDir, name: str, tmp_path: Path
) -> None:
    base, server = serving_job.base(), installed[name]
    model = serving_job.gguf(base, "base") if name == "llama.cpp" else base
    said: list[str] = []
    with (
        started(
            server, model, log=tmp_path / "x.log", name="law", dtype=serve.arithmetic(server, model), wait_s=900
        ) as endpoint,
        pytest.raises(GateError, match="SRV-012 the server's model is the base"),
    ):
        canary.canary(job, endpoint.url, said.append, model=endpoint.model)
    assert f"{endpoint.model}: base; of 8 prompts" in said[-1]
