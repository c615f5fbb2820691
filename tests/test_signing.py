"""A signed export and record are checked offline, by us and by model-signing's own command."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from finetune import machine, signing
from finetune.__main__ import main
from finetune.errors import RecipeError
from finetune.recipe import Recipe
from finetune.run import carry_on, run, start
from finetune.rundir import RunDir
from finetune.verify import findings, verify
from tests.job import Stages, ready


def write_key(folder: Path, name: str = "key", words: str = "", key: Any = None) -> tuple[Path, Path]:
    """A new private key and its other half, as PEM files."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    kept = serialization.BestAvailableEncryption(words.encode()) if words else plain
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, kept))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    """A signed run and the folder it is in, made while no socket can be opened."""
    folder = tmp_path_factory.mktemp("signed")
    private, _ = write_key(folder)

    def refuse(*_: Any) -> None:
        raise AssertionError("a signature by key needs no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return folder, run(ready(folder, sign=str(private)), launch=Stages())


@pytest.fixture
def signed(once: tuple[Path, RunDir], tmp_path: Path) -> tuple[RunDir, Path]:
    """A copy of it, and the public key."""
    shutil.copytree(once[1].path, tmp_path / "run")
    return RunDir(tmp_path / "run"), once[0] / "key.pub.pem"


def names(run_dir: RunDir, key: Path) -> list[str]:
    return [f"{f.name} {f.what}" for f in findings(run_dir, key) if f.about == "signature"]


def test_a_signed_run_verifies_with_the_other_half_of_the_key(signed: tuple[RunDir, Path]) -> None:
    run_dir, key = signed
    assert (run_dir.export / "model.sig").is_file() and run_dir.signature.is_file()
    assert verify(run_dir, key) == verify(run_dir) == 15


def test_the_command_of_model_signing_checks_it_too(signed: tuple[RunDir, Path]) -> None:
    run_dir, key = signed
    words = [sys.executable, "-m", "model_signing", "verify", "key", str(run_dir.export), "--public_key", str(key)]
    words += ["--signature", str(run_dir.export / "model.sig")]
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_a_changed_export_and_a_changed_record_are_named_by_their_signatures(signed: tuple[RunDir, Path]) -> None:
    run_dir, key = signed
    (run_dir.export / "model.safetensors").write_text("Export")
    assert names(run_dir, key) == [
        "export/model.sig is no signature of these files by this key: different: model.safetensors"
    ]
    (run_dir.export / "model.safetensors").write_text("export")
    run_dir.record.write_text(run_dir.record.read_text().replace('"processors"', ' "processors"'))
    assert names(run_dir, key) == ["run.json.sig is no signature of these files by this key: different: run.json"]


def test_a_file_put_into_a_signed_export_is_named(signed: tuple[RunDir, Path]) -> None:
    run_dir, key = signed
    (run_dir.export / "more.txt").write_text("?")
    assert names(run_dir, key) == ["export/model.sig is no signature of these files by this key: different: more.txt"]


def test_another_key_a_damaged_and_a_missing_signature_are_told(signed: tuple[RunDir, Path], tmp_path: Path) -> None:
    run_dir, key = signed
    _, other = write_key(tmp_path, "other")
    assert len(names(run_dir, other)) == 2
    run_dir.signature.write_bytes(b"\xff\x00")
    assert [name.split()[0] for name in names(run_dir, key)] == ["run.json.sig"]
    run_dir.signature.unlink()
    assert names(run_dir, key) == ["run.json.sig is missing"]
    assert [f.what for f in findings(run_dir)] == ["is missing, and the recipe asks for one"]


def test_verify_takes_the_key_as_a_word_and_says_whether_it_checked(
    signed: tuple[RunDir, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, key = signed
    assert main(["verify", f"run={run_dir.path}", f"public_key={key}"]) == 0
    assert "signatures: checked\n" in capsys.readouterr().out
    assert main(["verify", f"run={run_dir.path}"]) == 0
    assert "signatures: not checked, give public_key=pub.pem" in capsys.readouterr().out
    assert main(["verify", f"run={run_dir.path}", "public_key=gone.pem"]) == 3
    assert "SIG-003" in capsys.readouterr().err


def test_a_run_that_goes_on_is_signed_anew(once: tuple[Path, RunDir], tmp_path: Path) -> None:
    shutil.copytree(once[1].path, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    run_dir.report.unlink()
    carry_on(run_dir, launch=Stages())
    assert verify(run_dir, once[0] / "key.pub.pem") == 15


def test_what_cannot_sign_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    old = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = write_key(tmp_path)
    found = {
        "gone.pem": "it is no file",
        str(public): "it is no private key in PEM form",
        str(write_key(tmp_path, "rsa", key=old)[0]): "it is no elliptic-curve key of the curves",
        str(
            write_key(tmp_path, "koblitz", key=ec.generate_private_key(ec.SECP256K1()))[0]
        ): "it is no elliptic-curve key",
        str(write_key(tmp_path, "shut", words="open sesame")[0]): "it has a passphrase, which FINETUNE_KEY_PASSPHRASE",
    }
    for name, why in found.items():
        (sentence,) = signing.signing_problems(Recipe(sign=name))
        assert sentence.startswith(f"SIG-002 sign={name}: {why}") and "openssl ecparam" in sentence
    assert signing.signing_problems(Recipe(sign=str(private))) == signing.signing_problems(Recipe()) == []
    with pytest.raises(RecipeError, match="SIG-002"):
        start(ready(tmp_path, sign="gone.pem"))
    assert not (tmp_path / "runs").exists()


def test_a_key_with_a_passphrase_signs_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_key(tmp_path, words="open sesame")
    monkeypatch.setenv("FINETUNE_KEY_PASSPHRASE", "open sesame")
    run_dir = run(ready(tmp_path, sign=str(private)), launch=Stages())
    assert verify(run_dir, public) == 15
    assert all(b"sesame" not in p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file())


def test_without_the_package_signing_is_refused_at_the_start_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "model_signing" else find(name))
    (sentence,) = machine.fit_problems(Recipe(sign="key.pem"))
    assert sentence.startswith("SIG-001 sign=key.pem") and sentence.endswith("Type: pip install 'finetune[sign]'")
