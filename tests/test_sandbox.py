from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from finetune.errors import RunError
from finetune.evaluate import sandbox
from finetune.evaluate.sandbox import OUTPUT_BYTES, run_code

TESTS = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)\n"
LONG = 120.0
"""Seconds that no test here needs, also on a busy machine."""


def test_a_right_solution_passes_and_a_wrong_one_fails() -> None:
    assert run_code("def double(x):\n    return 2 * x" + TESTS, LONG).passed
    wrong = run_code("def double(x):\n    return x" + TESTS, LONG)
    assert not wrong.passed and wrong.how == "failed" and "AssertionError" in wrong.output


@pytest.mark.parametrize("leave", ["import os\nos._exit(0)", "raise SystemExit(0)", "exit_now = 1 / 0"])
def test_code_that_leaves_before_its_tests_has_not_passed(leave: str) -> None:
    assert not run_code(leave + TESTS, LONG).passed


@pytest.mark.parametrize("code", ["while True: pass", "import time, os\nos.close(1)\nos.close(2)\ntime.sleep(600)"])
def test_a_loop_without_end_is_ended(code: str) -> None:
    assert run_code(code, 3.0).how == "time"


def test_a_program_that_takes_all_memory_fails_alone() -> None:
    outcome = run_code("kept = []\nwhile True:\n    kept.append(bytearray(1 << 24))", LONG, memory_mib=256)
    assert not outcome.passed and "MemoryError" in outcome.output


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_no_process_and_no_thread_can_be_started(code: str) -> None:
    outcome = run_code(code, LONG)
    assert not outcome.passed
    assert "Operation not permitted" in outcome.output or "can't start new thread" in outcome.output


def test_nothing_is_written_removed_or_changed_outside_nor_in_its_own_folder(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("as it was")
    kept.chmod(0o644)
    for code in (
        f"open({str(new)!r}, 'w')",
        f"open({str(kept)!r}, 'a')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.rename({str(kept)!r}, {str(new)!r})",
        f"import os\nos.chmod({str(kept)!r}, 0o777)",
        f"import os\nos.mkdir({str(new)!r})",
        "open('here', 'w')",
    ):
        outcome = run_code(code, LONG)
        assert not outcome.passed and ("Errno 13" in outcome.output or "Errno 1]" in outcome.output), code
    assert kept.read_text() == "as it was" and kept.stat().st_mode & 0o777 == 0o644 and not new.exists()


def test_it_reads_neither_files_of_the_user_nor_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("a secret of the user")
    monkeypatch.setenv("A_SECRET", "another one")
    assert not run_code(f"print(open({str(tmp_path / 'secret')!r}).read())", LONG).passed
    seen = run_code("import os\nprint(os.environ)\nprint(os.getcwd())", LONG)
    assert seen.passed and "another one" not in seen.output and str(Path.cwd()) not in seen.output


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.socketpair()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
    ],
)
def test_no_socket_can_be_opened(code: str) -> None:
    outcome = run_code(code, LONG)
    assert not outcome.passed and "Operation not permitted" in outcome.output


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\nos.kill(PID, 0)", "Operation not permitted"),
        ("import resource\nresource.prlimit(PID, resource.RLIMIT_CPU, (1, 1))", "Operation not permitted"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "not allowed to raise maximum limit"),
    ],
)
def test_it_can_neither_touch_other_processes_nor_lift_its_limits(code: str, said: str) -> None:
    outcome = run_code(code.replace("PID", str(os.getpid())), LONG)
    assert not outcome.passed and said in outcome.output


def test_a_flood_of_output_is_cut_and_ended() -> None:
    outcome = run_code("while True:\n    print('x' * 1000)", LONG)
    assert outcome.how == "output" and len(outcome.output) <= OUTPUT_BYTES


def test_a_machine_that_cannot_confine_code_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os\nprint('cannot confine: this kernel has no Landlock', flush=True)\nos._exit(90)\n")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "CHILD", child)
        with pytest.raises(RunError, match=r"TSK-009 .*this kernel has no Landlock"):
            run_code("print(1)")
        assert sandbox.sandbox_problem() == "this kernel has no Landlock"
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RunError, match=r"TSK-009 .*this is darwin"):
        run_code("print(1)")
