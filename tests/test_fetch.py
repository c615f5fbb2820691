"""Packages and hub folders come into the cache whole, or an error says what to type."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune import terms
from finetune.errors import FinetuneError
from finetune.fetch import FetchError, cache_folder, extract, fetch_hub, fetch_package
from finetune.fetch import hub as hub_module
from finetune.fetch.child import run_child, writing
from finetune.fetch.hub import MANIFEST
from finetune.recipe import Recipe
from finetune.rundir import TEMPORARY, sha256_tree, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_wheel(folder: Path, text: str = "rows") -> tuple[Path, str]:
    """A wheel that pip accepts, `tiny-rows` 1.0, and its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_rows-1.0-py3-none-any.whl"
    info = "tiny_rows-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_rows/data/rows.txt", text)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-rows\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses instead of an index, so that these tests need no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def unfinished(cache: Path) -> list[Path]:
    return list(cache.rglob(TEMPORARY + "*"))


def test_a_package_is_fetched_once_and_then_served_without_a_network(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    wheel = fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=True)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
    (index / wheel.name).unlink()
    assert fetch_package("tiny_rows", "1.0", sha256, cache=tmp_path / "cache", network=False) == wheel
    assert unfinished(tmp_path / "cache") == []


def test_without_a_network_the_error_names_size_licence_hash_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        fetch_package("tiny-rows", "1.0", "ab" * 32, cache=tmp_path, network=False, size_mb=27, licence="CC-BY-4.0")
    text = str(caught.value)
    assert caught.value.code == "FET-001"
    for word in ("27 MB", "CC-BY-4.0", "network=true", "ab" * 32, str(tmp_path / "packages"), "tiny_rows-1.0-*.whl"):
        assert word in text
    assert not (tmp_path / "packages").exists(), "asking must write nothing"


def test_a_wheel_that_a_user_copied_into_the_folder_is_found(tmp_path: Path) -> None:
    wheel, sha256 = make_wheel(tmp_path / "cache" / "packages")
    assert fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=False) == wheel


def test_a_damaged_wheel_is_noticed_even_with_its_old_size_and_time_and_is_mended(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    cache = tmp_path / "cache"
    wheel = fetch_package("tiny-rows", "1.0", sha256, cache=cache, network=True)
    good, stat = wheel.read_bytes(), wheel.stat()
    wheel.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    os.utime(wheel, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(FetchError, match=r"FET-001 .*damaged"):
        fetch_package("tiny-rows", "1.0", sha256, cache=cache, network=False)
    assert fetch_package("tiny-rows", "1.0", sha256, cache=cache, network=True).read_bytes() == good


def test_a_deleted_wheel_is_fetched_again(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    wheel = fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=True)
    wheel.unlink()
    assert fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=True).is_file()


def test_an_index_that_serves_other_bytes_is_refused_and_nothing_is_kept(tmp_path: Path, index: Path) -> None:
    make_wheel(index)
    with pytest.raises(FetchError, match="FET-004"):
        fetch_package("tiny-rows", "1.0", "0" * 64, cache=tmp_path / "cache", network=True)
    assert list((tmp_path / "cache").rglob("*.whl")) == []
    assert unfinished(tmp_path / "cache") == []


def test_an_index_without_the_version_is_told_apart_from_no_network(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    with pytest.raises(FetchError, match="FET-009"):
        fetch_package("tiny-rows", "2.0", sha256, cache=tmp_path / "cache", network=True)


def test_an_index_that_cannot_be_reached_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FetchError) as caught:
        fetch_package("tiny-rows", "1.0", "0" * 64, cache=tmp_path / "cache", network=True)
    assert caught.value.code == "FET-003"
    assert str(tmp_path / "cache" / "packages") in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(FetchError, match=r"FET-002 .*ensurepip"):
        fetch_package("tiny-rows", "1.0", "0" * 64, cache=tmp_path / "cache", network=True)


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"FET-006 .*cache_dir="):
        fetch_package("tiny-rows", "1.0", "0" * 64, cache=tmp_path / "cache", network=True)


def test_a_full_disk_is_a_sentence_whoever_meets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(FetchError, match="FET-005"),
        writing(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr("finetune.fetch.package.run_child", lambda *_: (1, said))
    with pytest.raises(FetchError, match=r"FET-005 .*cache_dir="):
        fetch_package("tiny-rows", "1.0", "0" * 64, cache=tmp_path / "cache", network=True)
    assert unfinished(tmp_path / "cache") == []


def _fetch(cache: Path, sha256: str) -> None:
    assert fetch_package("tiny-rows", "1.0", sha256, cache=cache, network=True).is_file()


def test_two_processes_may_fetch_the_same_package_at_once(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_fetch, args=(tmp_path / "cache", sha256)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((tmp_path / "cache").rglob("*.whl"))) == 1
    assert unfinished(tmp_path / "cache") == []


def test_the_remains_of_a_killed_fetch_are_swept_away(tmp_path: Path, index: Path) -> None:
    _, sha256 = make_wheel(index)
    left = tmp_path / "cache" / "packages" / f"{TEMPORARY}tiny-rows-1.0"
    left.mkdir(parents=True)
    (left / "half.whl").write_text("half")
    fetch_package("tiny-rows", "1.0", sha256, cache=tmp_path / "cache", network=True)
    assert unfinished(tmp_path / "cache") == []


def test_a_child_process_does_not_outlive_an_interrupted_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(child: subprocess.Popen[bytes], *_: object) -> None:
        started.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.fetch.child._watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", "import time; time.sleep(600)"], {}, "sleeping", tmp_path)
    assert started[0].poll() is not None


def test_a_member_is_unpacked_and_mended_when_damaged_or_deleted(tmp_path: Path) -> None:
    wheel, _ = make_wheel(tmp_path, "one two")
    path = extract(wheel, "tiny_rows/data/rows.txt", cache=tmp_path / "cache")
    assert path.read_text() == "one two"
    path.write_text("one twO")
    assert extract(wheel, "tiny_rows/data/rows.txt", cache=tmp_path / "cache").read_text() == "one two"
    path.unlink()
    assert extract(wheel, "tiny_rows/data/rows.txt", cache=tmp_path / "cache").read_text() == "one two"
    assert unfinished(tmp_path / "cache") == []


def test_a_member_or_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    wheel, _ = make_wheel(tmp_path)
    with pytest.raises(FetchError, match=r"FET-007 .*other\.txt"):
        extract(wheel, "other.txt", cache=tmp_path)
    wheel.write_text("no zip")
    with pytest.raises(FetchError, match="FET-008"):
        extract(wheel, "tiny_rows/data/rows.txt", cache=tmp_path)


def hub_folder(cache: Path) -> Path:
    folder = cache / "hub" / f"org--name-{COMMIT[:12]}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(folder / MANIFEST, sha256_tree(folder))
    return folder


def test_a_hub_revision_must_be_a_commit(tmp_path: Path) -> None:
    for revision in ("main", "", COMMIT[:12]):
        with pytest.raises(FetchError, match="FET-010"):
            fetch_hub("org/name", revision, cache=tmp_path, network=True)


def test_a_hub_folder_is_served_offline_and_its_bytes_are_checked(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    assert fetch_hub("org/name", COMMIT, cache=tmp_path, network=False) == folder
    (folder / "model.safetensors").write_bytes(b"weightS")
    assert fetch_hub("org/name", COMMIT, cache=tmp_path, network=False, verify=False) == folder
    with pytest.raises(FetchError, match=r"FET-001 .*model\.safetensors"):
        fetch_hub("org/name", COMMIT, cache=tmp_path, network=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FetchError, match=r"FET-001 .*model\.safetensors is missing"):
        fetch_hub("org/name", COMMIT, cache=tmp_path, network=False, verify=False)


def test_a_hub_folder_that_is_missing_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"FET-001 .*network=true.*model\.source="):
        fetch_hub("org/name", COMMIT, cache=tmp_path, network=False)


def test_the_hub_child_has_the_network_but_no_telemetry_and_takes_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def download(words: list[str], environment: dict[str, str], title: str, folder: Path) -> tuple[int, str]:
        seen.update(words=words, environment=environment)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return 0, ""

    monkeypatch.setattr(hub_module, "run_child", download)
    folder = fetch_hub("org/name", COMMIT, cache=tmp_path, network=True)
    assert json.loads((folder / MANIFEST).read_text()).keys() == {"config.json"}
    environment = seen["environment"]
    assert isinstance(environment, dict)
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "1"
    assert set(terms.TEXTS) < set(hub_module.HUB_FILES)  # a text that is not fetched would be missing from the export
    assert not [p for p in hub_module.HUB_FILES if re.search(r"\.(py|bin|pt|pkl)$|^\*$", p)]


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError) as caught:
        fetch_hub("org/name", COMMIT, cache=tmp_path, network=True)
    assert caught.value.code == "FET-003"
    assert "Traceback" not in str(caught.value)


def test_the_cache_folder_is_the_recipes_then_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "env"))
    assert cache_folder(Recipe(cache_dir=str(tmp_path / "own"))) == tmp_path / "own"
    assert cache_folder(Recipe()) == tmp_path / "env"
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(Recipe()) == tmp_path / ".cache" / "finetune"


def test_every_fetch_error_ends_the_program_without_a_traceback() -> None:
    assert issubclass(FetchError, FinetuneError)
