"""Trackers beside train.json, each in its offline mode, writing below the run's `logs/`: `tracking(recipe, logs)`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import RunError
from finetune.recipe import Recipe

PREFIXES = ("TENSORBOARD_", "WANDB_", "MLFLOW_", "HF_MLFLOW_", "TRACKIO_")
"""How the trackers' own variables begin."""


@contextmanager
def tracking(recipe: Recipe, logs: Path) -> Iterator[list[Any]]:
    """transformers' callbacks of the trackers in `train.report_to`, whose runs end when the block does.

    Without network=true a tracker's own variables are out of sight in the block; with it they win over ours. Raises
    RunError (TRK-003) where a tracker of this process has its folder already.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    if not recipe.network:
        _forget()
    for tracker in recipe.train.report_to:
        for name, value in settings(tracker, recipe.name, logs).items():
            os.environ.setdefault(name, value)
    try:
        yield [kind() for kind in _callbacks(recipe.train.report_to)]
    finally:
        if "wandb" in recipe.train.report_to and "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # transformers leaves that to the end of the process
        _forget()
        os.environ.update(before)


def settings(tracker: str, project: str, logs: Path) -> dict[str, str]:
    """Variable -> value that keep a tracker in `logs` and off the network.

    Watched with strace: wandb 0.31.0, mlflow 3.17.2 and trackio 0.43.0 open no connection to an address.
    """
    own = logs.absolute() / tracker
    if tracker == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(logs)}
    own.mkdir(parents=True, exist_ok=True)
    if tracker == "wandb":
        folders = {f"WANDB_{name}": str(own) for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR")}
        return folders | {
            "WANDB_PROJECT": project,
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",  # to Sentry, offline or not
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",  # no copy of what the terminal shows
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            "WANDB_X_DISABLE_STATS": "true",  # its monitor knows a cloud's metadata address to ask
        }
    if tracker == "mlflow":
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{own}/mlflow.db",  # it refuses plain files by default
            "MLFLOW_EXPERIMENT_NAME": project,
            "MLFLOW_DISABLE_TELEMETRY": "true",  # it takes DO_NOT_TRACK=true for an answer, but not ours, 1
        }
    if "trackio" in sys.modules:  # it reads the folder once, when it is imported
        raise RunError(
            "TRK-003", "trackio of this process has its folder already", "it takes one per process", "a new process"
        )
    return {"TRACKIO_DIR": str(own), "TRACKIO_LOGBOOK_AUTONOTE": "0"}


def _forget() -> None:
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]


def _callbacks(names: list[str]) -> list[type]:
    from transformers.integrations import get_reporting_integration_callbacks

    kinds: list[type] = get_reporting_integration_callbacks(names)
    return kinds
