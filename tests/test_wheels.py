"""Packages of a bundle: what a lock names comes, with the bytes it names, and no package brings a program along."""

from __future__ import annotations

import hashlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from finetune.bundle import wheels
from finetune.bundle.install import install_text
from finetune.bundle.verify import BundleError

BACKEND = """
import zipfile
try:
    import stranger
except ImportError:
    pass
def build_wheel(folder, *_):
    name, info = "tiny_source-1.0-py3-none-any.whl", "tiny_source-1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tiny-source\\nVersion: 1.0\\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return name
"""
PROJECT = '[build-system]\nrequires = ["stranger"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def wheel(folder: Path, name: str, version: str, *needs: str, program: str = "") -> str:
    """The line of a lock for a wheel that is now in the folder. `program`: what it does when it is imported."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", program)
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return pin(path, name, version)


def source(folder: Path, canary: Path) -> str:
    """The line for a source package which asks for another to be built with, that touches the canary."""
    wheel(folder, "stranger", "1.0", program=f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    path = folder / "tiny_source-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("backend.py", BACKEND), ("pyproject.toml", PROJECT), ("PKG-INFO", "")):
            member = tarfile.TarInfo(f"tiny_source-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return pin(path, "tiny-source", "1.0")


def pin(path: Path, name: str, version: str) -> str:
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages; what is listed by `serve` is all that pip can find."""
    (tmp_path / "index").mkdir()
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index" / "simple").as_uri())
    return tmp_path / "index"


def serve(index: Path) -> None:
    for path in [*index.glob("*.whl"), *index.glob("*.tar.gz")]:
        page = index / "simple" / path.name.partition("-")[0].replace("_", "-") / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as file:
            file.write(f'<a href="{path.as_uri()}">{path.name}</a>\n')


def fetched(tmp_path: Path, index: Path, lock: str) -> set[str]:
    """Names of the files that come for a lock."""
    serve(index)
    (tmp_path / "lock").write_text(lock)
    wheels.fetch_locked(tmp_path / "lock", tmp_path / "wheels")
    return {path.name for path in (tmp_path / "wheels").iterdir()}


def test_the_package_that_is_built_with_would_touch_the_canary(tmp_path: Path) -> None:
    source(tmp_path, tmp_path / "touched")
    shutil.unpack_archive(tmp_path / "stranger-1.0-py3-none-any.whl", tmp_path, "zip")
    runpy.run_path(str(tmp_path / "stranger" / "__init__.py"))
    assert (tmp_path / "touched").exists()


def test_a_lock_without_hashes_brings_nothing(tmp_path: Path, index: Path) -> None:
    line = wheel(index, "tiny_rows", "1.0")
    with pytest.raises(BundleError, match="BND-005"):
        fetched(tmp_path, index, line.partition(" ")[0])
    assert fetched(tmp_path, index, line) == {"tiny_rows-1.0-py3-none-any.whl"}


def test_what_a_locked_package_asks_for_beside_the_lock_does_not_come(tmp_path: Path, index: Path) -> None:
    wheel(index, "stranger", "1.0")
    assert fetched(tmp_path, index, wheel(index, "tiny_rows", "1.0", "stranger")) == {"tiny_rows-1.0-py3-none-any.whl"}


def test_what_a_source_package_asks_to_be_built_with_is_not_run(tmp_path: Path, index: Path, canary: Path) -> None:
    assert fetched(tmp_path, index, source(index, canary)) == {"tiny_source-1.0.tar.gz"}


def test_torch_comes_with_what_the_lock_says_and_a_lock_of_its_own(tmp_path: Path, index: Path, canary: Path) -> None:
    wanted = next(r for r in map(Requirement, metadata.requires("finetune") or []) if r.name == "torch")
    version = str(wanted.specifier).removeprefix("==")
    lines = [source(index, canary), wheel(index, "torch", version, "tiny_rows", "tiny-source")]
    wheel(index, "tiny_rows", "2.0")
    fetched(tmp_path, index, wheel(index, "tiny_rows", "1.0"))
    assert wheels.fetch_torch(tmp_path / "lock", tmp_path / "wheels") == "".join(lines)
    assert len(list((tmp_path / "wheels").iterdir())) == 3, "another version than the lock has"


@pytest.mark.parametrize("file", ["requirements.lock", "pyproject.toml"])
def test_without_a_checkout_there_is_no_lock_of_the_program(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    (tmp_path / file).write_text("")
    with pytest.raises(BundleError, match=r"BND-004 .*bundle\.wheels=false"):
        wheels.lock_of_program()
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    assert wheels.lock_of_program() == tmp_path / "requirements.lock"


# --- as INSTALL.txt has them installed ------------------------------------------------------------------------------


def installed(tmp_path: Path, lock: str) -> tuple[int, str]:
    """(exit code, what pip said) of the line of INSTALL.txt for a lock, for packages in `wheels`."""
    (tmp_path / "my.lock").write_text(lock)
    facts = dict.fromkeys(("title", "when", "version", "python", "platform"), "x")
    (line,) = [x for x in install_text(facts, [], [], ["my.lock"]).splitlines() if "pip install" in x]
    words = line.removeprefix("$ ../finetune-venv/bin/python ").split()
    command = [sys.executable, *words, "--target", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_installing_asks_no_index_and_for_nothing_beside_the_lock(tmp_path: Path, index: Path) -> None:
    serve(index)
    (tmp_path / "wheels").mkdir()
    code, said = installed(tmp_path, wheel(tmp_path / "wheels", "tiny_rows", "1.0", "stranger"))
    assert code == 0 and "Looking in links" in said and "Looking in indexes" not in said, said


def test_installing_takes_no_lock_without_hashes_and_no_other_bytes(tmp_path: Path, index: Path) -> None:
    (tmp_path / "wheels").mkdir()
    line = wheel(tmp_path / "wheels", "tiny_rows", "1.0")
    code, said = installed(tmp_path, line.partition(" ")[0])
    assert code and "Hashes are required in --require-hashes mode" in said, said
    wheel(tmp_path / "wheels", "tiny_rows", "1.0", program="other")
    code, said = installed(tmp_path, line)
    assert code and "DO NOT MATCH THE HASHES" in said, said


def test_installing_runs_nothing_that_a_source_package_asks_to_be_built_with(
    tmp_path: Path, index: Path, canary: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    code, said = installed(tmp_path, source(tmp_path / "wheels", canary))
    assert code == 0 and (tmp_path / "site" / "tiny_source-1.0.dist-info").is_dir(), said
