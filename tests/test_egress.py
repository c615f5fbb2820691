"""Nothing leaves: the guard inside a process, and scripts/egress_check.sh around a whole job."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import OFFLINE, egress

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "scripts" / "egress_check.sh"
NAMESPACE = (
    subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    if shutil.which("unshare")
    else False
)
STRACE = bool(shutil.which("strace"))
SMALL = ("train.max_steps=1", "train.rehearse_memory=false", "export.formats=[peft]", "evaluate.rows=2")
SWALLOWED = """
try:
    {call}
except OSError:
    pass
"""


def check(tmp_path: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """(exit code, egress.json) of scripts/egress_check.sh with these words."""
    out = tmp_path / "egress.json"
    env = {**os.environ, "PYTHON": sys.executable, "CI": "true", **environment}
    bash = shutil.which("bash") or "bash"
    done = subprocess.run([bash, CHECK, "--out", out, *words], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr, done.stderr
    assert out.is_file(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text())


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    """The words of a Python program."""
    (tmp_path / "program.py").write_text(text)
    return ("--", sys.executable, str(tmp_path / "program.py"))


# --- the guard ------------------------------------------------------------------------------------------------------

CALLS = {
    "socket.connect": "socket.socket().connect(('192.0.2.1', 80))",
    "socket.getaddrinfo": "urllib.request.urlopen('http://example.org/', timeout=1)",
    "socket.sendto": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "socket.bind": "socket.socket().bind(('0.0.0.0', 0))",
    "socket.gethostbyname": "socket.gethostbyname('example.org')",
    "socket.gethostbyaddr": "socket.gethostbyaddr('192.0.2.1')",
    "socket.getnameinfo": "socket.getnameinfo(('192.0.2.1', 53), 0)",
    "socket.sendmsg": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, ('192.0.2.1', 53))",
}


@pytest.mark.parametrize("event", CALLS)
def test_the_guard_notes_and_refuses_whatever_is_not_this_machine(event: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import finetune, socket, urllib.request\n" + CALLS[event]
    env = {**os.environ, egress.VARIABLE: str(log), "http_proxy": "", "HTTP_PROXY": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "nothing leaves this machine" in done.stderr, done.stderr
    assert [entry["event"] for entry in egress.attempts(log)] == ["guarded", event]


@pytest.mark.parametrize("kind", ["bytes", "bytearray"])
def test_a_host_written_in_bytes_is_noted_as_any_other(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import finetune, socket\n"
        "def tried(call, *words):\n    try:\n        call(*words)\n    except PermissionError:\n        pass\n"
        f"tried(socket.socket().connect, ({kind}(b'192.0.2.1'), 80))\ntried(socket.getaddrinfo, b'example.org', 80)\n"
        f"with socket.create_server(('127.0.0.1', 0)) as one:\n"
        f"    socket.socket().connect(({kind}(b'127.0.0.1'), one.getsockname()[1]))\n"
    )
    env = {**os.environ, egress.VARIABLE: str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert [entry["address"] for entry in egress.attempts(log)] == ["", "192.0.2.1:80", "example.org"]


def test_a_child_adds_to_the_log_of_its_parent_which_is_for_one_user(tmp_path: Path) -> None:
    log = tmp_path / "log"
    call = "socket.socket().connect(('192.0.2.1', 80))"
    code = f"import finetune, socket, subprocess, sys\nif sys.argv[1:]: {call}\n"
    code += "subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'x'], stderr=-3)\n" + call
    env = {**os.environ, egress.VARIABLE: str(log)}
    subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, cwd=ROOT)
    noted = egress.attempts(log)
    assert [entry["event"] for entry in noted] == ["guarded", "guarded", "socket.connect", "socket.connect"]
    assert [noted[i]["process"] == noted[0]["process"] for i in range(4)] == [True, False, False, True]
    assert log.stat().st_mode & 0o777 == 0o600
    assert {len(entry["program"]) for entry in noted} == {200}, "a line is short enough to be written at once"


def test_this_machine_itself_may_be_spoken_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import finetune, socket\n"
        "with socket.create_server(('127.0.0.1', 0)) as one: socket.create_connection(one.getsockname()).close()\n"
        "socket.getaddrinfo('localhost', 80); socket.getnameinfo(('127.0.0.1', 80), 3)\n"
        "a, b = socket.socketpair(); a.send(b'x')\n"
        f"u = socket.socket(socket.AF_UNIX); u.bind({str(tmp_path / 'u')!r}); u.listen()\n"
        f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'u')!r})\n"
    )
    env = {**os.environ, egress.VARIABLE: str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert [entry["event"] for entry in egress.attempts(log)] == ["guarded"]


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("::ffff:192.0.2.1", False),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("fe80::1%eth0", False),
    ],
)
def test_loopback_alone_is_this_machine(host: str, local: bool) -> None:
    assert egress.is_local(host) is local


def test_to_listen_on_every_interface_is_not_to_stay_at_home() -> None:
    with socket.socket() as one:
        assert egress.outside("socket.bind", (one, ("0.0.0.0", 80))) == "0.0.0.0:80"
        assert egress.outside("socket.bind", (one, ("127.0.0.1", 80))) == ""
        assert egress.outside("socket.sendmsg", (one, None)) == ""


@pytest.mark.parametrize(("family", "address"), [("AF_INET6", ("2001:db8::1", 80, 0, 0)), ("AF_VSOCK", (2, 80))])
def test_addresses_of_other_families_are_noted_too(family: str, address: tuple[Any, ...]) -> None:
    one = SimpleNamespace(family=getattr(socket, family, -1))
    assert egress.outside("socket.connect", (one, address)) == f"{address[0]}:80"


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_every_interface_is_home_for_who_connects_and_not_for_who_listens(host: str) -> None:
    assert (egress.is_local(host), egress.is_local(host, listening=True)) == (True, False)


def test_hosts_are_named_as_they_were_asked_for_and_a_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    name, address = (
        json.dumps({"event": event, "address": address}) + "\n"
        for event, address in (("socket.getaddrinfo", "example.org"), ("socket.connect", "192.0.2.1:80"))
    )
    (tmp_path / "log").write_text(name[:9] + "\n" + address)
    assert egress.hosts(tmp_path / "log") == ["192.0.2.1:80"]
    (tmp_path / "log").write_text(address + name)
    assert egress.hosts(tmp_path / "log") == ["example.org"]


SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_EVALUATE_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
"""Variable of a library's documentation -> the value with which it neither asks nor tells."""


def test_the_switches_are_closed_whatever_the_environment_says() -> None:
    code = "import os, json, finetune; print(json.dumps(dict(os.environ)))"
    opened = {name: "0" if value == "1" else "1" for name, value in SWITCHES.items()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | opened, capture_output=True, text=True, cwd=ROOT
    )
    seen = json.loads(done.stdout)
    assert {name: seen[name] for name in SWITCHES} == SWITCHES == OFFLINE


# --- the check ------------------------------------------------------------------------------------------------------


def test_a_quiet_command_passes_with_ci_unset_and_every_proof_shown_an_attempt_first(tmp_path: Path) -> None:
    text = "import os, finetune\nassert 'CI' not in os.environ and 'HF_HUB_OFFLINE' in os.environ"
    code, found = check(tmp_path, *script(tmp_path, text), HF_HUB_OFFLINE="1")
    assert (code, found["attempts"], found["exit_code"]) == (0, [], 0)
    assert set(found["removed_from_environment"]) >= {"CI", "HF_HUB_OFFLINE"}
    given = {name for name, proof in found["proofs"].items() if proof["given"]}
    assert given == {"guard"} | ({"namespace"} if NAMESPACE else set()) | ({"strace"} if STRACE else set())
    assert len(found["not_proven"]) == 3 - len(given)
    assert found["verdict"].startswith("no attempt was made, by guard")


def test_a_call_from_python_that_swallows_its_error_fails_the_check(tmp_path: Path) -> None:
    text = "import finetune, urllib.request\n" + SWALLOWED.format(call="urllib.request.urlopen('http://example.org/')")
    code, found = check(tmp_path, *script(tmp_path, text), http_proxy="", HTTP_PROXY="")
    assert (code, found["exit_code"]) == (1, 0)
    assert [(a["event"], a["address"]) for a in found["attempts"] if a["seen_by"] == "guard"] == [
        ("socket.getaddrinfo", "example.org")
    ]


@pytest.mark.skipif(not (NAMESPACE or STRACE), reason="neither a namespace nor strace is permitted here")
def test_a_native_call_that_python_does_not_see_fails_the_check(tmp_path: Path) -> None:
    text = (
        "import ctypes, struct\nlibc = ctypes.CDLL(None)\n"
        "to = struct.pack('=H', 2) + struct.pack('!H', 9) + bytes([192, 0, 2, 1]) + bytes(8)\n"
        "libc.connect(libc.socket(2, 2, 0), to, 16)\n"
    )
    code, found = check(tmp_path, *script(tmp_path, text))
    assert code == 1
    seen = {attempt["seen_by"] for attempt in found["attempts"]}
    assert seen == ({"namespace"} if NAMESPACE else set()) | ({"strace"} if STRACE else set())


@pytest.mark.skipif(not NAMESPACE, reason="no namespace is permitted here")
def test_without_strace_the_kernel_still_counts_a_native_call(tmp_path: Path) -> None:
    tools = only(tmp_path, "unshare")
    text = "import ctypes, struct\nlibc = ctypes.CDLL(None)\n" + (
        "to = struct.pack('=H', 2) + struct.pack('!H', 9) + bytes([192, 0, 2, 1]) + bytes(8)\n"
        "libc.connect(libc.socket(2, 2, 0), to, 16)\n"
    )
    code, found = check(tmp_path, *script(tmp_path, text), PATH=tools)
    assert code == 1 and [attempt["seen_by"] for attempt in found["attempts"]] == ["namespace"]
    assert found["not_proven"] == ["no guard in the Python processes", "system calls were not traced"]


def test_where_neither_namespace_nor_strace_is_permitted_that_is_said_and_no_more_is_claimed(tmp_path: Path) -> None:
    tools = only(tmp_path)
    code, found = check(tmp_path, *script(tmp_path, "import finetune"), PATH=tools)
    assert (code, found["verdict"]) == (0, "no attempt was made, by guard")
    assert len(found["not_proven"]) == 2 and found["proofs"]["namespace"]["interfaces"] is None
    code, found = check(tmp_path, *script(tmp_path, "pass"), PATH=tools)  # a program without the guard, too
    assert (code, found["verdict"]) == (2, "no verdict: none of the proofs could be given here")


def only(tmp_path: Path, *programs: str) -> str:
    """A PATH with these programs and what the script itself needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "git", "true", *programs):
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)


def test_a_command_that_fails_is_no_proof(tmp_path: Path) -> None:
    code, found = check(tmp_path, *script(tmp_path, "import finetune, sys; sys.exit(5)"))
    assert (code, found["verdict"]) == (3, "no verdict: the command ended with exit code 5")


def test_what_strace_writes_is_understood() -> None:
    spec = importlib.util.spec_from_file_location("egress_check", ROOT / "scripts" / "egress_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trace = ROOT / "tests" / "strace.txt"
    calls, unix, processes = module.traced(trace)
    assert [(call["event"], call["address"]) for call in calls] == [
        ("connect", "192.0.2.1:80"),
        ("connect", "2001:db8::1:443"),
        ("sendto", "10.0.0.53:53"),
        ("sendmmsg", "10.0.0.54:53"),
        ("bind", "0.0.0.0:8000"),
        ("connect", "/run/systemd/resolve/io.systemd.Resolve"),
        ("connect", "AF_VSOCK, svm_cid=VMADDR_CID_HOST, svm_port=22"),
    ]
    assert unix == ["/run/systemd/resolve/io.systemd.Resolve", "/var/run/nscd/socket"] and processes == 3


@pytest.mark.slow
def test_a_whole_rehearsal_makes_no_attempt(tmp_path: Path) -> None:
    words = ("recipe=qwen3_30b_legal", "scale=rehearsal", f"cache_dir={tmp_path / 'cache'}", *SMALL)
    code, found = check(tmp_path, *words)
    assert (code, found["attempts"]) == (0, []), found
    assert found["stages"] == ["data", "train", "evaluate", "merge", "export", "report"]
    assert found["proofs"]["guard"]["processes"] >= 2, "the proof of the merge is a process of its own"
    assert str(tmp_path / "runs") not in json.dumps(found) and str(ROOT) not in json.dumps(found["command"])


@pytest.mark.slow
def test_one_call_put_into_a_stage_on_purpose_is_found(tmp_path: Path) -> None:
    text = (
        "import sys, urllib.request, finetune.data as room\nfrom finetune.__main__ import main\nstage = room.prepare\n"
        "def phoning(run):\n    try:\n        urllib.request.urlopen('http://192.0.2.1/', timeout=1)\n"
        "    except OSError:\n        pass\n    return stage(run)\nroom.prepare = phoning\n"
        "if __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
    )
    places = (f"cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path / 'runs'}")
    words = ("data", "recipe=qwen3_30b_legal", "scale=rehearsal", *places)
    code, found = check(tmp_path, *script(tmp_path, text), *words, http_proxy="", HTTP_PROXY="")
    assert (code, found["exit_code"]) == (1, 0), "the job itself ends well: it swallows the error"
    assert any(a["address"] == "192.0.2.1" for a in found["attempts"] if a["seen_by"] == "guard")
