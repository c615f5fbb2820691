"""Trackers: what they get is what train.json says, below the run, and nothing leaves the machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import machine
from finetune.check import TRACKERS, problems
from finetune.compose import load_recipe
from finetune.errors import RecipeError
from finetune.failures import explain
from finetune.run import run, start
from finetune.rundir import read_json
from finetune.train.trackers import settings, tracking
from tests.job import good

ROOT = Path(__file__).resolve().parents[1]


def curves(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every scalar in the TensorBoard files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_curves_in_tensorboard_are_those_of_train_json(tmp_path):
    words = ("scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "train.max_steps=12")
    done = run(load_recipe("legal_quickstart", *words), until="train")
    told, found = read_json(done.train), curves(done.logs)
    for ours, theirs in {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm"}.items():
        expected = [(step["step"], pytest.approx(step[ours], rel=1e-6)) for step in told["steps"]]
        assert found[f"train/{theirs}"] == expected and len(expected) == 12
    assert len(found["train/tokens_per_second"]) == len(found["train/peak_memory_gib"]) == 12
    layer = "train/router/model.layers.1.mlp.experts"
    assert [step for step, _ in found[f"{layer}/entropy"]] == [1, 11, 12]
    assert set(told["router"]) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    picture = done.loss_plot.read_bytes()
    assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") >= 800


def test_without_trackers_nothing_is_logged(tmp_path):
    words = ("scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "train.report_to=[]")
    done = run(load_recipe("legal_quickstart", *words), until="train")
    assert done.train.is_file() and not done.logs.exists()


def test_a_tracker_that_does_not_exist_is_refused_with_those_that_do():
    (problem,) = problems(good(train__report_to=["tensorboard", "excel"]))
    assert problem.startswith("TRK-001 train.report_to: excel is not one of tensorboard, wandb, mlflow, trackio.")
    assert problems(good(train__report_to=list(TRACKERS))) == []


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    there = machine.metadata.distributions
    monkeypatch.setattr(machine.metadata, "distributions", lambda name: [] if name == "wandb" else there(name=name))
    words = ("scale=rehearsal", f"runs_dir={tmp_path}", "train.report_to=[tensorboard,wandb]")
    with pytest.raises(RecipeError) as refused:
        start(load_recipe("legal_quickstart", *words))
    assert refused.value.problems == [
        "TRK-002 train.report_to: wandb is not installed. Type: pip install finetune[wandb], or leave it out."
    ]
    assert list(tmp_path.iterdir()) == []


def test_every_tracker_has_an_extra_of_its_name():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(TRACKERS) - {"tensorboard"} <= set(extras)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_everything_that_a_tracker_writes_is_below_the_logs(tracker, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    found = settings(tracker, "job", tmp_path / "logs")
    paths = [value.removeprefix("sqlite:///") for name, value in found.items() if "DIR" in name or "URI" in name]
    assert paths and all(Path(path).is_relative_to(tmp_path / "logs") for path in paths)


HOSTILE = {
    "WANDB_MODE": "online",
    "WANDB_BASE_URL": "http://127.0.0.9:1",
    "MLFLOW_TRACKING_URI": "http://127.0.0.9:2",
    "TRACKIO_SERVER_URL": "http://127.0.0.9:3",
    "TRACKIO_SPACE_ID": "somebody/space",
    "HF_MLFLOW_LOG_ARTIFACTS": "true",
}


def test_variables_of_trackers_decide_with_network_only_and_come_back(tmp_path, monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    for tracker in ("wandb", "mlflow"):
        monkeypatch.setattr("finetune.train.trackers._callbacks", lambda names: [])
        recipe = good(train__report_to=[tracker], network=False)
        with tracking(recipe, tmp_path):
            kept = {name: value for name, value in os.environ.items() if name in HOSTILE}
            assert set(kept) == {"wandb": {"WANDB_MODE"}, "mlflow": {"MLFLOW_TRACKING_URI"}}[tracker]
            assert list(kept.values()) in (["offline"], [f"sqlite:///{tmp_path}/mlflow/mlflow.db"])
        assert {name: os.environ[name] for name in HOSTILE} == HOSTILE
        with tracking(good(train__report_to=[tracker], network=True), tmp_path):
            assert {name: os.environ[name] for name in HOSTILE} == HOSTILE
            assert tracker != "mlflow" or os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert "MLFLOW_DISABLE_TELEMETRY" not in os.environ


def test_with_network_a_tracker_without_variables_of_its_own_stays_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("finetune.train.trackers._callbacks", lambda names: [])
    with tracking(good(train__report_to=["wandb"], network=True), tmp_path):
        assert os.environ["WANDB_MODE"] == "offline"
    assert "WANDB_MODE" not in os.environ


def test_a_tracker_that_fails_is_named_as_such(capsys):
    error = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})("no server at 10.0.0.1\nmore")
    assert explain(error, None) == 3
    said = capsys.readouterr().err
    assert said.startswith("TRK-004 the tracker mlflow failed: no server at 10.0.0.1. ") and "more" not in said


GUARDED = """
import socket, sys
def guard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if not (event == "socket.connect" and args[0].family == socket.AF_UNIX):
            print("CALLED OUT", event, args, flush=True)
            raise OSError("no network in this test")
sys.addaudithook(guard)
from finetune.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_an_installed_tracker_gets_the_run_and_calls_nobody(tracker, tmp_path):
    """Where it is installed. The guard sees this process; a tracker's helper process is not seen by it."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    environment = {**os.environ, **HOSTILE, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    words = ["train", "recipe=legal_quickstart", "scale=rehearsal", f"runs_dir={tmp_path / 'runs'}"]
    words += [f"cache_dir={tmp_path / 'cache'}", f"train.report_to=[{tracker}]"]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "CALLED OUT" not in done.stdout
    logs = tmp_path / "runs" / "legal_quickstart" / "0001" / "logs" / tracker
    written = b"".join(path.read_bytes() for path in logs.rglob("*") if path.is_file())
    assert b"tokens_per_second" in written and b"router/model.layers.0" in written
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "cache", "home"}
