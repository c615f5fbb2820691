"""A prepared set is found again by its content, survives being killed, and is shared by processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from finetune.data.part import Maker
from finetune.data.prepare import prepared, store_of
from finetune.data.store import LIBRARIES, explain
from finetune.errors import DataError
from finetune.recipe import Recipe
from tests import preparing
from tests.test_data import jsonl, qa
from tests.warm import ROOT, Forked

ROWS = 6000
"""Enough for several blocks, so that worker processes are started."""


def recipe(tmp_path: Path, path: Path, **settings: Any) -> Recipe:
    return preparing.recipe(tmp_path / "cache", path, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return jsonl(path, *(qa(f"question {i}", f"answer {i}", group=i % 50) for i in range(ROWS)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any, base: Path, rows: Path) -> dict[str, bytes]:
    """What undisturbed processes make of the rows."""
    return content(prepared(recipe(tmp_path_factory.mktemp("whole"), rows), base))


def test_the_same_content_is_prepared_once_wherever_it_lies(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)))
    first = prepared(recipe(tmp_path, path), base)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(path, tmp_path / "elsewhere" / "rows.jsonl")
    os.utime(moved, (1, 1))
    elsewhere = shutil.copytree(base, tmp_path / "base")
    monkeypatch.setattr(Maker, "make", None)
    assert prepared(recipe(tmp_path, Path(moved), workers=1), elsewhere) == first


@pytest.mark.parametrize("change", ["row", "setting", "template", "tokenizer", "version"])
def test_whatever_changes_tokens_changes_the_address(
    tmp_path: Path, base: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)))
    own = shutil.copytree(base, tmp_path / "base")
    before = store_of(recipe(tmp_path, path), own).key
    settings: dict[str, Any] = {}
    if change == "row":
        path.write_bytes(path.read_bytes().replace(b"q3", b"Q3"))
    elif change == "setting":
        settings["max_length"] = 511
    elif change == "template":
        (own / "chat_template.jinja").write_text((own / "chat_template.jinja").read_text() + " ")
    elif change == "tokenizer":
        (own / "tokenizer.json").write_text((own / "tokenizer.json").read_text() + " ")
    else:
        monkeypatch.setattr("finetune.data.store.version", lambda name: f"{name} 0")
    assert store_of(recipe(tmp_path, path, **settings), own).key != before
    assert (
        store_of(recipe(tmp_path, path, **settings, workers=7), own).key
        == store_of(recipe(tmp_path, path, **settings), own).key
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_version_of_each_library_changes_the_address_by_itself(
    tmp_path: Path, base: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)))
    before = store_of(recipe(tmp_path, path), base).key
    monkeypatch.setattr(
        "finetune.data.store.version", lambda name: version(name) + ("+other" if name == library else "")
    )
    assert store_of(recipe(tmp_path, path), base).key != before


def test_the_libraries_that_render_tokenise_pack_and_read_are_in_the_address() -> None:
    assert {"transformers", "tokenizers", "jinja2", "trl", "datasets", "pyarrow"} <= set(LIBRARIES)


def test_explain_says_what_differs(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)))
    store = store_of(recipe(tmp_path, path), base)
    assert "has no set" in explain(store.root, store.address)[0]
    folder = prepared(recipe(tmp_path, path), base)
    assert explain(store.root, store.address)[0] == f"prepared before: {folder}"
    other = store_of(recipe(tmp_path, path, max_length=99, turns="last"), base)
    text = "\n".join(explain(other.root, other.address))
    assert "settings.max_length: there 512, now 99" in text
    assert 'settings.turns: there "all", now "last"' in text
    assert "files" not in text.replace(str(tmp_path), "")


def test_a_set_that_lost_a_byte_is_made_again(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)))
    folder = prepared(recipe(tmp_path, path), base)
    before = content(folder)
    (folder / "train.arrow").chmod(0o644)
    (folder / "train.arrow").write_bytes(before["train.arrow"][:-1])
    assert content(prepared(recipe(tmp_path, path), base)) == before


def test_one_process_and_several_give_the_same_bytes(
    tmp_path: Path, base: Path, rows: Path, whole: dict[str, bytes]
) -> None:
    several = whole
    alone = content(prepared(recipe(tmp_path / "alone", rows, workers=1), base))
    assert several.keys() >= {"train.arrow", "heldout.arrow", "ledger.jsonl", "report.json", "mask.txt"}
    for name in several.keys() - {"seal.json", "report.json"}:
        assert several[name] == alone[name], name
    reports = [json.loads(c["report.json"]) for c in (several, alone)]
    for report in reports:
        report["settings"].pop("workers")
    assert reports[0] == reports[1]


def start(tmp_path: Path, rows: Path, base: Path, *block: str, forked: bool = True) -> Any:
    """A process that prepares the rows: a fork, to which nothing is imported anew, or one as the product has it."""
    words = [str(rows), str(base), str(tmp_path / "cache"), *block]
    if forked:
        return Forked("tests.preparing", words)
    command = [sys.executable, "-m", "tests.preparing", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def finished_slices(cache: Path) -> dict[str, int]:
    """Name -> time of writing (ns) of the notes of finished slices, and of the cache files that they name."""
    notes = cache.glob("prepared/.parts-*/*.json")
    named = [[note, *(note.parent / name for name in json.loads(note.read_text())["files"])] for note in notes]
    return {path.name: path.stat().st_mtime_ns for paths in named for path in paths}


def killed_after_a_slice(process: Any, cache: Path) -> bool:
    """Kills a preparation when it has finished one more slice; whether it came to that."""
    had, deadline = len(finished_slices(cache)), time.monotonic() + 120
    while process.poll() is None and len(finished_slices(cache)) <= had and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return bool(process.returncode)


@pytest.mark.slow
def test_killed_preparation_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, base: Path, rows: Path, whole: dict[str, bytes]
) -> None:
    killed = sum(killed_after_a_slice(start(tmp_path, rows, base), tmp_path / "cache") for _ in range(3))
    assert killed >= 2
    done = start(tmp_path, rows, base, forked=False)
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 0, said
    assert content(Path(said.splitlines()[-1])) == whole
    assert not list((tmp_path / "cache" / "prepared").glob(".parts-*"))


@pytest.mark.slow
def test_killed_before_any_change_on_disk_it_starts_again_and_leaves_the_same_bytes_and_nothing_else(
    tmp_path: Path, base: Path
) -> None:
    turns = (qa(f"question {i}", ("yes", "no")[i % 2], group=i % 20, choices=["yes", "no"]) for i in range(60))
    path = jsonl(tmp_path / "rows.jsonl", *turns)
    said, _ = Forked("tests.preparing_killed", [str(path), str(base), str(tmp_path)]).communicate(timeout=300)
    undisturbed, *killed = (json.loads(line) for line in said.splitlines() if line[0] == "[")
    assert {"train.arrow", "packed.arrow", "seal.json"} <= undisturbed[1].keys()
    moments = "\n".join(moment for moment, _, _ in killed)
    for stage in (
        r"open .*\.parts-N/reading/.*\.arrow",  # reading
        r"rename .*\.parts-N/tmpN",  # mapping
        r"rename .*\.parts-N/\.partial-N\.json",  # the note of a slice
        r"open .*\.parts-N$",  # near copies
        r"remove .*\.partial-N-N/train\.unordered",  # classes in turn
        r"open .*\.partial-N-N/ledger\.jsonl",
        r"rename .*\.partial-N-N/tmpN",  # packing
        r"rename .*\.partial-N-N/\.partial-seal\.json",
        r"chmod .*\.partial-N-N",
        r"rename .*\.partial-N-N$",  # the whole set
        r"rmdir .*\.parts-N$",
    ):
        assert re.search(f"^(os\\.)?{stage}", moments, re.MULTILINE), stage
    for moment, made, left in killed:
        assert (made, left) == (undisturbed[1], undisturbed[2]), moment
    assert [name for name in undisturbed[2] if not re.fullmatch(r"tmp|cache(/prepared(/\.lock-\w+)?)?", name)] == []


def test_what_a_worker_cannot_start_with_is_said_and_nothing_is_left(tmp_path: Path, base: Path, rows: Path) -> None:
    bare = shutil.copytree(base, tmp_path / "base")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="TPL-001"):
        prepared(recipe(tmp_path, rows), bare)
    assert not list((tmp_path / "cache" / "prepared").glob(".parts-*"))


def test_parts_of_rows_that_are_refused_do_not_stay(tmp_path: Path, base: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(qa(f"q{i}", "a") for i in range(20)), {"messages": []})
    with pytest.raises(DataError, match="DATA-001"):
        prepared(recipe(tmp_path, path), base, tmp_path / "rejected")
    assert not list((tmp_path / "cache" / "prepared").glob(".parts-*"))
    assert len((tmp_path / "rejected" / "ledger.jsonl").read_text().splitlines()) == 21


@pytest.mark.slow
def test_two_processes_that_prepare_the_same_do_not_harm_each_other(
    tmp_path: Path, base: Path, rows: Path, whole: dict[str, bytes]
) -> None:
    both = [start(tmp_path, rows, base) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folders = {Path(words.splitlines()[-1]) for words in said}
    assert len(folders) == 1
    assert sum("another process prepares the same rows" in words for words in said) <= 1
    assert content(folders.pop()) == whole
