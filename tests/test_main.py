"""The command line: words, help, errors, sweeps. Real processes where a process is what is claimed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import failures, sweep
from finetune.__main__ import VERBS, help_text, main, read
from finetune.commands import Request
from finetune.compose import read_recipe, recipe_yaml
from finetune.errors import GateError, RecipeError, RunError
from finetune.run import start
from finetune.rundir import RunDir, open_run, write_text
from tests.job import Stages, ready

ROOT = Path(__file__).resolve().parent.parent


def finetune(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m finetune` with these words."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "finetune", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.mark.parametrize("words", [[], ["--help"], ["recipes"], ["--version"], ["plan", "-h"]])
def test_help_and_lists_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from finetune.__main__ import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_names_every_verb_and_recipes_lists_every_recipe() -> None:
    assert all(f"\n  {verb} " in help_text() for verb in VERBS)
    listed = finetune("recipes").stdout
    names = [path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")]
    assert len(names) >= 8 and all(name in listed for name in names)


def test_every_verb_leads_to_a_function() -> None:
    import importlib

    for target, _ in VERBS.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_words_are_sorted_whatever_their_order() -> None:
    request = read(["recipe=x", "-m", "--config-dir", "mine", "a=1,2"])
    assert request == Request(verb="run", settings=["recipe=x", "a=1,2"], config_dir="mine", sweep=True)
    assert read(["plan", "--json", "run=runs/x/0001"]) == Request(verb="plan", run="runs/x/0001", as_json=True)
    assert read(["--config-dir=a=b", "recipe=x", "train"]) == Request(
        verb="train", settings=["recipe=x"], config_dir="a=b"
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["paln", "recipe=x"], ["paln is no verb", "Nearest: plan"]),
        (["recipe=x", "legal"], ["legal is not of the form key=value"]),
        (["recipe=x", "--multi"], ["--multi is no option"]),
        (["run="], ["run= lacks the path"]),
        (["verify", "-m", "run=x"], ["-m does not go with verify"]),
        (["train", "--json"], ["--json goes with plan and verify only"]),
        (["--config-dir"], ["--config-dir is no option"]),
    ],
)
def test_words_that_are_not_understood_are_told(words: list[str], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read(words)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["recipe=legal_quikstart"], "CFG-002"),
        (["recipe=legal_quickstart", "+adapter.rnak=3"], "CFG-001"),
        (["recipe=legal_quickstart", "adapter.rank=0"], "CHK-002"),
        (["recipe=legal_quickstart", "+hf_token=abcdefgh"], "CFG-006"),
        (["--config-dir", "nowhere", "recipe=x"], "CFG-009"),
        (["run=runs/x/0001", "seed=3", "plan"], "CFG-010"),
        (["-m", "run=runs/x/0001"], "CFG-010"),
        (["chat", "recipe=x"], "CFG-010"),
    ],
)
def test_a_wrong_word_ends_with_code_2_one_sentence_and_no_traceback(
    words: list[str], code: str, tmp_path: Path
) -> None:
    done = finetune(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(code) and "Traceback" not in done.stderr
    assert "abcdefgh" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_recipe_without_weights_ends_at_once_with_what_is_missing(tmp_path: Path) -> None:
    done = finetune("recipe=llama4_70b_legal", cwd=tmp_path, FINETUNE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 3 and done.stderr.startswith("WGT-003") and "scale=rehearsal" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_none_is_told(tmp_path: Path) -> None:
    done = finetune("verify", f"run={tmp_path}")
    assert done.returncode == 3 and done.stderr.startswith("RUN-004")


def test_check_says_that_nothing_stands_in_the_way(tmp_path: Path) -> None:
    done = finetune("check", "recipe=qwen3_30b_legal", "scale=rehearsal", FINETUNE_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "qwen3_30b_legal: nothing stands in the way.\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m finetune plan recipe=qwen3_30b_legal; echo code $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -1"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] in ("code 0", "code 1", "code 141")


SLOW_STAGE = """\
import signal, sys, time, finetune.worker as worker
import types
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with it ignored
def slow(run_dir):
    print("stage begins", flush=True)
    time.sleep(60)
stage = types.ModuleType("slow_stage"); stage.slow = slow; sys.modules["slow_stage"] = stage
worker.STAGES["data"] = "slow_stage:slow"
from finetune.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_with_one_sentence_that_says_how_to_continue(tmp_path: Path) -> None:
    run_dir = start(ready(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_STAGE, f"run={run_dir.path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    while "stage begins" not in child.stdout.readline():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.strip().splitlines() == [
        "Stopped. Finished stages are kept, nothing half-written is used. "
        f"To continue: python -m finetune run={run_dir.path}"
    ]


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (RunError("RUN-003", "busy", "why", "fix"), 3, ["RUN-003 busy: why. Try: fix"]),
        (RecipeError(["A one", "B two"]), 2, ["A one\nB two\n"]),
        (GateError("EVAL-004", "gate"), 4, ["EVAL-004 gate."]),
        (KeyboardInterrupt(), 130, ["Stopped.", "run="]),
        (OSError(errno.ENOSPC, "No space left on device"), 3, ["DSK-002 the disk is full", "run="]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, ["DSK-002"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 3, ["RUN-007 /x/y: permission denied"]),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), 3, ["RUN-007 /x/y: read-only file system"]),
        (
            ModuleNotFoundError("no", name="hydra.core"),
            3,
            ["DEP-001 the package hydra-core is missing", "pip install hydra-core"],
        ),
        (MemoryError(), 3, ["MEM-001 out of memory"]),
        (BrokenPipeError(), 141, []),
        (SystemExit(5), 5, []),
    ],
)
def test_each_failure_has_its_sentence_and_its_exit_code(
    error: BaseException, code: int, parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(failures, "_close_stdout", lambda: None)
    assert failures.explain(error, RunDir(tmp_path)) == code
    said = capsys.readouterr().err
    assert all(part in said for part in parts)
    assert bool(said) == bool(parts)
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_full_disk_is_still_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as inner:
            raise ValueError("could not save") from inner
    except ValueError as error:
        assert failures.explain(error, None) == 3
    assert "DSK-002" in capsys.readouterr().err


def test_a_defect_writes_its_traceback_into_the_run_and_hides_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise ValueError("broken with hf_AbCdEfGhIjKlMn")
    except ValueError as error:
        assert failures.explain(error, RunDir(tmp_path)) == 1
    said, logged = capsys.readouterr().err, (tmp_path / "error.log").read_text()
    assert said.startswith("BUG-001 unexpected ValueError: broken with [hidden].") and "Traceback" not in said
    assert str(tmp_path / "error.log") in said
    assert "Traceback" in logged and "hf_AbC" not in logged


def test_a_defect_outside_a_run_is_logged_in_a_temporary_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.explain(KeyError("x"), None) == 1
    log = Path(capsys.readouterr().err.split("details: ")[1].strip().removesuffix(")."))
    assert "KeyError" in log.read_text()
    log.unlink()


def test_a_missing_package_is_named_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise ModuleNotFoundError(\"No module named 'hydra'\", name='hydra')")
    done = finetune("plan", "recipe=legal_quickstart", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 3 and done.stderr.startswith("DEP-001 the package hydra-core is missing. Type: ")


def test_a_sweep_refuses_all_jobs_before_the_first_one_starts(tmp_path: Path) -> None:
    done = finetune("-m", "recipe=qwen3_30b_legal", "scale=rehearsal", "adapter.rank=8,0,-1", f"runs_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("CHK-002 adapter.rank=") == 2
    assert list(tmp_path.iterdir()) == []


def job(tmp_path: Path, number: int, words: tuple[str, ...], loss: float | None, code: int = 0) -> sweep.Job:
    path = tmp_path / f"{number:04d}"
    write_text(path / "recipe.yaml", recipe_yaml(ready(tmp_path)))
    run_dir = open_run(path)
    if loss is not None:
        write_text(
            run_dir.scores,
            f'{{"base": {{"loss": 2.5}}, "tuned": {{"loss": {loss}, "accuracy": 0.5}}, "gates": []}}',
        )
    return sweep.Job(words, run_dir, code)


def test_a_sweep_ends_with_a_table_sorted_by_tuned_loss(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    page = Console(file=io.StringIO(), width=200)
    jobs = [job(tmp_path, 1, ("a=1",), 1.5), job(tmp_path, 2, ("a=2",), None, 3), job(tmp_path, 3, ("a=3",), 0.5)]
    sweep.show_jobs(jobs, page)
    assert isinstance(page.file, io.StringIO)
    lines = page.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a=3", "a=1", "a=2"]
    assert "0.5000" in lines[1] and "50.0%" in lines[1] and "failed, exit code 3" in lines[3]


def test_a_sweep_carries_out_each_job_in_its_own_folder(tmp_path: Path) -> None:
    from rich.console import Console

    ready(tmp_path)
    carried_out = []

    def carry_out(words: list[str]) -> int:
        carried_out.append(words)
        return 3 if len(carried_out) == 1 else 0

    words = ["recipe=legal_quickstart", f"model.source={tmp_path / 'base'}", f"runs_dir={tmp_path / 'runs'}"]
    words += [f"cache_dir={tmp_path}", "adapter.rank=8,16"]
    assert sweep.sweep(words, None, "evaluate", Console(quiet=True), carry_out) == 3
    runs = tmp_path / "runs" / "legal_quickstart"
    assert carried_out == [["evaluate", f"run={runs / name}"] for name in ("0001", "0002")]
    assert [read_recipe(runs / name / "recipe.yaml").adapter.rank for name in ("0001", "0002")] == [8, 16]


def test_a_job_of_a_sweep_is_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.process(["verify"]) == 2
    assert capfd.readouterr().err.startswith("CFG-010")


def test_verify_prints_how_many_files_are_as_recorded_and_names_a_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.run import run

    run_dir = run(ready(tmp_path), launch=Stages())
    capsys.readouterr()
    assert main(["verify", f"run={run_dir.path}"]) == 0
    assert "15 files are as recorded" in capsys.readouterr().out
    run_dir.report.write_text("changed")
    assert main(["verify", f"run={run_dir.path}"]) == 3
    assert "report.html has changed" in capsys.readouterr().err
    assert main(["verify", f"run={run_dir.path}", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["findings"] == [{"about": "file", "name": "report.html", "what": "has changed"}]
    assert told["verified"] is False and told["files"] == 15 and told["signature"] == "none"
    assert main(["verify", f"run={run_dir.path}", "rows=1"]) == 2


def test_plan_of_a_run_uses_its_prepared_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.run import run

    run_dir = run(ready(tmp_path), until="data", launch=Stages())
    capsys.readouterr()
    assert main(["plan", f"run={run_dir.path}", "--json"]) == 0
    assert '"the prepared data of this run"' in capsys.readouterr().out


def test_a_thread_that_fails_says_so_in_a_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import threading

    from finetune.failures import quiet_threads

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    quiet_threads()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == "a background thread ended early, OSError: [Errno 28] No space left on device\n"
