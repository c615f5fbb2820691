"""GPUs as nvidia-smi describes them, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import gpus
from finetune.plan import plan
from tests.job import good

LINES = "NVIDIA H100 80GB HBM3, 81559, 81003\nNVIDIA RTX A2000, 6138, 512\nno devices were found\n"


def program(folder: Path, words: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{words}\n")
    file.chmod(0o755)


def test_lines_of_nvidia_smi_become_gpus_and_other_lines_none() -> None:
    found = gpus.read(LINES)
    assert [gpu.name for gpu in found] == ["NVIDIA H100 80GB HBM3", "NVIDIA RTX A2000"]
    assert found[0].total_gib == pytest.approx(79.65, abs=0.01) and found[1].free_gib == 0.5


def test_a_machine_without_the_program_or_with_one_that_fails_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.gpus() == []
    program(tmp_path, "exit 9")
    assert gpus.gpus() == []
    monkeypatch.setattr(gpus, "SECONDS", 0.2)
    program(tmp_path, "exec /bin/sleep 5")
    assert gpus.gpus() == []


def test_the_plan_says_of_each_gpu_here_whether_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, f"printf '{LINES}'".replace("\n", "\\n"))
    here = plan(good(), gpus=gpus.gpus()).here
    assert [figure.basis for figure in here] == ["measured", "measured"]
    assert here[0].how.startswith("NVIDIA H100 80GB HBM3, 79.1 GiB free") and here[0].how.endswith("GiB fit")
    assert here[1].how.endswith("GiB do not fit")
    assert plan(good()).here == ()
