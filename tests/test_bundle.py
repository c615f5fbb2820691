"""A bundle is whole or not there; verify names what changed; INSTALL.txt works where there is no network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.__main__ import main
from finetune.bundle import pack as pack_module
from finetune.bundle import verify as verify_module
from finetune.bundle.contents import contents
from finetune.bundle.pack import pack
from finetune.bundle.verify import BundleError, unsafe, verify
from finetune.compose import compose, load_recipe
from finetune.rundir import TEMPORARY, sha256_file
from tests.test_fetch import make_wheel

ROOT = Path(__file__).resolve().parents[1]
NAME = "qwen3_30b_legal"
ALONE = (
    ["unshare", "-rn"] if shutil.which("unshare") and not subprocess.run(["unshare", "-rn", "true"]).returncode else []
)


def offline(folder: Path) -> dict[str, str]:
    """An environment in which pip knows one folder and no index."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a rehearsal with a lock of one small package, as the verb makes it."""
    top = tmp_path_factory.mktemp("bundle")
    _, sha256 = make_wheel(top / "index")
    (top / "tiny.lock").write_text(f"tiny-rows==1.0 --hash=sha256:{sha256}\n")
    words = ["bundle", f"recipe={NAME}", "scale=rehearsal", "network=true", f"cache_dir={top / 'cache'}"]
    words += [f"bundle.lock={top / 'tiny.lock'}", f"out={top / 'site' / 'bundle'}"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(top / "index").items():
            patch.setenv(name, value)
        assert main(words) == 0
    return top / "site" / "bundle"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(packed, tmp_path / "bundle")


@pytest.fixture(scope="module")
def tar(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same recipe as one file, without packages."""
    out = tmp_path_factory.mktemp("tar") / "site.tar"
    pack(load_recipe(NAME, "scale=rehearsal", f"cache_dir={packed.parents[1] / 'cache'}"), out, print, wheels=False)
    return out


def test_a_bundle_holds_what_a_site_needs_and_its_manifest_says_so(packed: Path) -> None:
    files = verify(packed)["files"]
    rooms = {name.partition("/")[0] for name in files}
    assert rooms >= {"wheels", "cache", "recipes", "cards", "licences", "INSTALL.txt", "sbom.cdx.json"}
    assert rooms >= {"requirements.lock", "program.lock"}
    assert any(name.endswith(".safetensors") for name in files)
    for name, facts in files.items():
        data = (packed / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=packed, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert list(packed.parent.rglob(f"{TEMPORARY}*")) == []


def change(folder: Path) -> str:
    path = next(folder.rglob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return f"{path.relative_to(folder)} has other bytes"


def cut(folder: Path) -> str:
    (folder / "INSTALL.txt").write_text("")
    return r"INSTALL\.txt has other bytes \(0 bytes, packed were"


def remove(folder: Path) -> str:
    (folder / "sbom.cdx.json").unlink()
    return "sbom.cdx.json is missing"


def add(folder: Path) -> str:
    (folder / "wheels" / "evil-1.0-py3-none-any.whl").write_text("x")
    return "wheels/evil-1.0-py3-none-any.whl was added"


def exchange(folder: Path) -> str:
    make_wheel(folder / "wheels", "other rows")
    return r"wheels/tiny_rows-1\.0-py3-none-any\.whl has other bytes"


def hide(folder: Path) -> str:
    (folder / "cache" / ".hidden").write_text("x")
    return "cache/.hidden was added"


def link(folder: Path) -> str:
    path = folder / "INSTALL.txt"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    return "INSTALL.txt is a link"


def change_sums(folder: Path) -> str:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[1:]))
    return "SHA256SUMS has other bytes"


def remove_sums(folder: Path) -> str:
    (folder / "SHA256SUMS").unlink()
    return "SHA256SUMS is missing"


def link_folder(folder: Path) -> str:
    (folder / "wheels").rename(folder.parent / "wheels")
    (folder / "wheels").symlink_to(folder.parent / "wheels")
    return "wheels is a link"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe is no plain file"


DAMAGE = (change, cut, remove, add, exchange, hide, link, link_folder, pipe, change_sums, remove_sums)


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_is_not_as_it_was_packed_is_named(damage: Callable[[Path], str], copy: Path) -> None:
    wanted = damage(copy)
    with pytest.raises(BundleError, match=rf"BND-002(?s:.*){wanted}"):
        verify(copy)


def test_what_a_link_leads_to_is_not_read(copy: Path) -> None:
    (copy / "loop").symlink_to(".")
    with pytest.raises(BundleError) as caught:
        verify(copy)
    assert str(caught.value).count("loop") == 1 and "loop is a link" in str(caught.value)


RACE = """
import pathlib, sys
from finetune.bundle.verify import verify
path = pathlib.Path(sys.argv[1]) / "INSTALL.txt"
def swap(event, args):
    if event == "open" and str(args[0]) == str(path) and not path.is_symlink():
        path.symlink_to(path.rename(path.parents[1] / "elsewhere"))
sys.addaudithook(swap)
verify(path.parent)
"""


def test_a_link_that_takes_the_place_of_a_file_while_it_is_looked_at_is_not_followed(copy: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, copy], capture_output=True, text=True, cwd=ROOT)
    assert (copy / "INSTALL.txt").is_symlink() and "symbolic links" in done.stderr


def test_a_manifest_larger_than_any_is_not_read(copy: Path, tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "LARGEST_MANIFEST", 1000)
    for path in (copy, tar):
        with pytest.raises(BundleError, match=r"BND-001 .*no bundle\.json that can be read"):
            verify(path)


MANIFESTS = (
    *("", "[]", "{}", "[" * 99_999, '{"files": []}', '{"files": {"x": 1}}', '{"files": {"x": {"bytes": 1}}}'),
    '{"files": {"../x": {"bytes": 1, "sha256": "a"}}}',
    '{"files": {"INSTALL.txt": {"bytes": "1", "sha256": "a"}}}',
    '{"files": {"INSTALL.txt": {"bytes": 1, "sha256": 1}}}',
    '{"files": {"INSTALL.txt": {"bytes": 1, "sha256": "a", "more": 1}}}',
)


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none_or_names_a_file_outside_is_refused(text: str, copy: Path) -> None:
    (copy / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match="BND-001"):
        verify(copy)


NAMES = ("/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "", ".", "a\\b", "a\nb", "a\rb", "a\0b")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_outside_or_can_be_read_in_two_ways_is_unsafe(name: str) -> None:
    assert unsafe(name)
    assert not unsafe("cache/bases/x/.sha256.json")


def evil(name: str, kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info, b"x" * info.size


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (evil("../outside"), r"'\.\./outside' would be written outside"),
        (evil("/tmp/outside"), "'/tmp/outside' would be written outside"),
        (evil("a-link", tarfile.SYMTYPE), "a-link is a link"),
        (evil("a-hard-link", tarfile.LNKTYPE), "a-hard-link is a link"),
        (evil("a-device", tarfile.CHRTYPE), "a-device is no file"),
        (evil("INSTALL.txt"), "INSTALL.txt is there twice"),
        (evil("bundle.json"), "bundle.json is there twice"),
        (evil("more.txt"), "more.txt was added"),
    ],
)
def test_a_tar_file_with_a_foreign_member_is_refused(
    member: tuple[tarfile.TarInfo, bytes], said: str, tar: Path, tmp_path: Path
) -> None:
    assert verify(tar)["recipe"] == NAME
    bad = shutil.copy(tar, tmp_path / "bad.tar")
    with tarfile.open(bad, "a") as archive:
        archive.addfile(member[0], io.BytesIO(member[1]))
    with pytest.raises(BundleError, match=rf"BND-002(?s:.*){said}"):
        verify(bad)


def test_a_tar_file_that_was_cut_or_has_to_be_unpacked_is_refused(tar: Path, tmp_path: Path) -> None:
    data = tar.read_bytes()
    for bad in (*(data[: int(len(data) * share)] for share in (0.0, 0.3, 0.8)), gzip.compress(data, 1)):
        (tmp_path / "bad.tar").write_bytes(bad)
        with pytest.raises(BundleError, match="BND-00"):
            verify(tmp_path / "bad.tar")


def test_folder_and_tar_file_hold_the_same_but_for_the_packages(packed: Path, tar: Path) -> None:
    folder, file = verify(packed)["files"], verify(tar)["files"]
    apart = {"INSTALL.txt", "requirements.lock", "program.lock"}
    assert {name for name in folder if not name.startswith("wheels/")} - apart == set(file) - apart
    with tarfile.open(tar) as archive:
        install = archive.extractfile("INSTALL.txt")
        typed = commands(install.read().decode() if install else "")
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in archive} == {(0, 0, "", "", 0)}, "of nobody"
    checks = ["sha256sum bundle.json", "sha256sum --quiet -c SHA256SUMS"]
    assert typed[:3] == [*checks, "${FINETUNE_PYTHON} -m finetune bundle verify ."]
    typed = commands((packed / "INSTALL.txt").read_text())
    assert typed[:2] == checks and typed[5] == "../finetune-venv/bin/python -m finetune bundle verify ."


def commands(install: str) -> list[str]:
    return re.findall(r"^\$ (.*)$", install, re.MULTILINE)


@pytest.mark.slow
def test_the_commands_of_install_txt_work_where_there_is_no_network(copy: Path, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    bare = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    typed = commands((copy / "INSTALL.txt").read_text())
    assert len(typed) == 10
    for line in typed[:-2]:  # to the check, and the folder to work in
        done = subprocess.run([*ALONE, "sh", "-c", line], cwd=copy, env=bare, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    names = subprocess.run(["../finetune-venv/bin/pip", "list"], cwd=copy, env=bare, capture_output=True, text=True)
    assert {"finetune", "tiny-rows"} <= set(names.stdout.split())
    # torch and the rest are not in this small bundle: its recipe is planned, and its rows prepared, by our own Python.
    ours = bare | {"PYTHONPATH": str(ROOT)}
    for line in (typed[-2], typed[-1].replace("-m finetune ", "-m finetune data ")):
        line = line.replace("../finetune-venv/bin/python", sys.executable)
        done = subprocess.run([*ALONE, "sh", "-c", line], cwd=copy, env=ours, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "finetune-work" / "runs" / NAME / "0001" / "data" / "report.json").is_file()
    assert verify(copy), "working beside it has changed the bundle"


def test_the_frozen_recipe_gives_the_same_settings_from_the_bundle(packed: Path) -> None:
    recipe = load_recipe(NAME, "scale=rehearsal", "runs_dir=runs", "cache_dir=cache", "network=false")
    there = compose(verify(packed)["words"], str(packed / "recipes"))
    assert there == recipe and not there.network


def test_own_rows_and_base_are_packed_with_the_settings_that_name_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    (rows / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/a.jsonl"):
        (rows / name).write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["scale=rehearsal", "data.card=", "data.sample=false", f"cache_dir={tmp_path / 'cache'}"]
    words += [f"data.train_files=[{rows},{rows}/a.jsonl]", f"data.heldout_files=[{rows}/deep/a.jsonl]"]
    found = contents(load_recipe(NAME, *words))
    assert found.recipe.data.train_files == ["rows/train_files-0", "rows/train_files-1"]
    own = {name: path for name, path in found.files.items() if name.startswith("rows/")}
    assert len(own) == 4 and own["rows/train_files-1/a.jsonl"] == rows / "a.jsonl"
    base = next(path for path in (tmp_path / "cache" / "bases").iterdir())
    recipe = load_recipe(NAME, f"cache_dir={tmp_path / 'cache'}", *words[1:3], words[-2])
    own_base = contents(replace(recipe, model=replace(recipe.model, source=str(base))))
    assert own_base.recipe.model.source == "base" and "base/config.json" in own_base.files
    (base / ".cache").mkdir()
    (base / ".cache" / "token").write_text("canary")
    (base / ".gitattributes").write_text("canary")
    assert contents(replace(recipe, model=replace(recipe.model, source=str(base)))).files == own_base.files


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sign=key.pem"], "BND-003"),
        (["data.card=my/own.yaml"], "BND-003"),
        (["data.card=my/own.yml"], "BND-003"),
        (["network=false"], "BND-005"),
        (["network=true"], "BND-007"),
    ],
)
def test_what_cannot_be_packed_is_a_sentence_and_leaves_nothing(
    words: list[str], code: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = packed.parents[1] / "cache"
    recipe = load_recipe(NAME, "scale=rehearsal", f"cache_dir={cache}", *words)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BundleError, match=code):
        pack(recipe, tmp_path / "out.tar", print, wheels=code == "BND-005")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["out", "out.tar"])
@pytest.mark.parametrize("name", ["a\\b.jsonl", "a\nb.jsonl"])
def test_a_file_whose_name_can_be_read_in_two_ways_is_not_packed(
    name: str, out: str, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["data=files", f"data.train_files=[{tmp_path / 'rows'}]", f"cache_dir={packed.parents[1] / 'cache'}"]
    with pytest.raises(BundleError, match=r"BND-003 .* cannot be the name of a file in a bundle"):
        pack(load_recipe(NAME, "scale=rehearsal", *words), tmp_path / out, print, wheels=False)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_a_lock_that_the_index_does_not_serve_leaves_nothing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in offline(packed.parents[1] / "index").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "lock").write_text(f"tiny-rows==1.0 --hash=sha256:{'0' * 64}\n")
    recipe = load_recipe(NAME, "scale=rehearsal", f"cache_dir={packed.parents[1] / 'cache'}", "network=true")
    with pytest.raises(BundleError, match="BND-005"):
        pack(recipe, tmp_path / "site" / "out", print, lock=tmp_path / "lock")
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_nothing_is_overwritten(packed: Path) -> None:
    recipe = load_recipe(NAME, "scale=rehearsal", f"cache_dir={packed.parents[1] / 'cache'}")
    with pytest.raises(BundleError, match=r"BND-006 .* is there already"):
        pack(recipe, packed, print, wheels=False)


def test_settings_that_a_rehearsal_has_the_last_word_on_are_not_packed_as_others(packed: Path, tmp_path: Path) -> None:
    cache = packed.parents[1] / "cache"
    recipe = load_recipe(NAME, "scale=rehearsal", f"cache_dir={cache}", "train.max_steps=9")
    with pytest.raises(BundleError, match=r"BND-003 settings under train "):
        pack(recipe, tmp_path / "out", print, wheels=False)


def test_the_verb_says_what_it_checked_and_ends_with_3_where_something_changed(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "verify", str(copy)]) == 0
    assert f"files are as they were packed for {NAME}" in capsys.readouterr().out
    sums = (copy / "SHA256SUMS").read_text()
    assert f"{sha256_file(copy / 'bundle.json')}  bundle.json\n" in sums
    add(copy)
    assert main(["bundle", "verify", str(copy)]) == 3
    assert "evil-1.0-py3-none-any.whl was added" in capsys.readouterr().err
    for words in (["bundle", "verify"], ["bundle"], ["bundle", f"recipe={NAME}"], ["bundle", "verify", "a", "b"]):
        assert main(words) == 2


def test_verify_needs_no_other_package(packed: Path) -> None:
    words = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune.__main__ import main; sys.exit(main())"
    done = subprocess.run([*words, code, "bundle", "verify", str(packed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((packed / "bundle.json").read_text())["schema"] == 1
