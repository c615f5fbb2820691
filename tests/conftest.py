"""What several test files share."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long come first: shared out by file, none of them is begun when all else is done."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """See `_freeze`."""
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """See `_freeze`: after the last test of a file."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """What is imported by now stays: looked at again whenever garbage is collected, it would cost a second at each.

    Every stage of a job ends with that.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: Any) -> Path:
    """A folder with a byte-level tokenizer and a ChatML template."""
    from tests.test_data import CHATML, make_tokenizer

    folder: Path = tmp_path_factory.mktemp("base")
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def merged_run(tmp_path_factory: Any) -> Any:
    """(run folder, what was said) of a rehearsal that has been merged, with an adapter that is plainly felt."""
    import contextlib
    import io

    from finetune.compose import load_recipe
    from finetune.run import run

    folder, said = tmp_path_factory.mktemp("merged-run"), io.StringIO()
    words = ["scale=rehearsal", f"runs_dir={folder}", f"cache_dir={folder / 'cache'}", "train.lr=0.01"]
    with contextlib.redirect_stdout(said):
        done = run(load_recipe("qwen3_30b_legal", *words), until="merge")
    return done, said.getvalue()


@pytest.fixture(scope="module")
def forked_proofs() -> Any:
    """The process that proves a merge is a fork of one that has imported what it needs (`tests/warm.py`)."""
    from tests.warm import proofs_are_forks

    with proofs_are_forks():
        yield


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A file that must not be there when the test ends."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload was run"


@pytest.fixture(scope="module")
def slurm_of_module(tmp_path_factory: Any) -> Any:
    """A cluster of two nodes whose jobs find this checkout, train on the CPU and leave cores to each other."""
    from tests.slurm_cluster import cluster

    settings = {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as found:
            yield found


@pytest.fixture
def slurm(slurm_of_module: Any) -> Any:
    """That cluster; after the test no job is in its queue, and no process of one is left."""
    from tests.slurm_cluster import left_over, run, until

    yield slurm_of_module
    run("scancel", "--user", str(os.getuid()))
    until(lambda: not run("squeue", "--noheader"), 40, "jobs do not end")
    marks = (str(slurm_of_module.conf), "SLURM_JOB_ID=")
    until(lambda: not left_over(*marks), 20, lambda: str(left_over(*marks)))
