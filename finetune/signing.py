"""The export and the record, signed by a key: `sign(run_dir, key)`, `signature_problems(run_dir, public_key)`. Offline.

Signatures are those of OpenSSF model-signing, by an elliptic-curve key: its own command checks them too. Its other mode
writes into a public log over the network, and is never used here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.errors import RunError
from finetune.recipe import Recipe
from finetune.rundir import SIGNATURE, TEMPORARY, RunDir, fsync

PASSPHRASE = "FINETUNE_KEY_PASSPHRASE"
"""Environment variable with the passphrase of a key, where it has one."""
INSTALL = "pip install 'finetune[sign]'"


def signing_problems(recipe: Recipe) -> list[str]:
    """A sentence for everything that would stop the signing at the end of a run."""
    if not recipe.sign:
        return []
    if importlib.util.find_spec("model_signing") is None:
        return [f"SIG-001 sign={recipe.sign}: the package model-signing is not installed. Type: {INSTALL}"]
    if why := _unfit(Path(recipe.sign).expanduser()):
        make = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
        other = "openssl ec -in key.pem -pubout -out pub.pem"
        return [f"SIG-002 sign={recipe.sign}: {why}. Make one: {make}; its other half, to check with: {other}"]
    return []


def sign(run_dir: RunDir, key: Path) -> None:
    """Writes export/model.sig over every file of the export, and run.json.sig over the record."""
    from model_signing import hashing, signing

    with TemporaryDirectory(dir=run_dir.path, prefix=TEMPORARY) as scratch:
        for target, signature in _signatures(run_dir).items():
            config = signing.Config().use_elliptic_key_signer(private_key=key.expanduser(), password=_passphrase())
            config.set_hashing_config(hashing.Config().set_ignored_paths(paths=_ignored(target)))
            made = Path(scratch) / signature.name
            config.sign(target, made)
            fsync(made)
            made.replace(signature)


def is_signed(run_dir: RunDir) -> bool:
    """Whether both signatures are there."""
    return all(signature.is_file() for signature in _signatures(run_dir).values())


def signature_problems(run_dir: RunDir, public_key: Path) -> list[str]:
    """A phrase for every signature that is missing or is not of these bytes by this key. Raises RunError (SIG-001)."""
    if importlib.util.find_spec("model_signing") is None:
        raise RunError("SIG-001", "the package model-signing is not installed", "it checks signatures", INSTALL)
    if not public_key.expanduser().is_file():
        why = "it is the other half of the key that signed"
        raise RunError("SIG-003", f"public_key={public_key} is no file", why, "public_key=pub.pem")
    found = []
    for target, signature in _signatures(run_dir).items():
        name = signature.relative_to(run_dir.path).as_posix()
        if not signature.is_file():
            found.append(f"{name} is missing")
        elif why := _wrong(target, signature, public_key.expanduser()):
            found.append(f"{name} is no signature of these files by this key: {why}")
    return found


def _signatures(run_dir: RunDir) -> dict[Path, Path]:
    return {run_dir.export: run_dir.export / SIGNATURE, run_dir.record: run_dir.signature}


def _wrong(target: Path, signature: Path, public_key: Path) -> str:
    """What model-signing says against a signature; empty when it holds."""
    from model_signing import hashing, verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=_ignored(target)))
    try:
        config.verify(target, signature)
    except Exception as error:  # a damaged signature raises whatever its parser does
        told = str(error)
        differ = re.findall(r"Hash mismatch for \\?'([^'\\]*)\\?'", told)
        others = re.findall(r"(?:Extra|Missing) files (?:found )?in model '[^']*': ([^\"]*)", told)
        names = ", ".join(name if name != "." else target.name for name in [*differ, *others])
        return f"different: {names}" if names else " ".join(told.split())[:200] or type(error).__name__
    return ""


def _ignored(target: Path) -> list[str]:
    """What a signature does not cover: itself. The rest is all there is below the target."""
    return [SIGNATURE] if target.is_dir() else []


def _passphrase() -> Any:
    # model-signing 1.1.1 says that it takes a text, and hands it to cryptography, which takes bytes.
    return os.environ[PASSPHRASE].encode() if PASSPHRASE in os.environ else None


def _unfit(path: Path) -> str:
    """Why a file cannot sign; empty when it can."""
    if not path.is_file():
        return "it is no file"
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key: Any = load_pem_private_key(path.read_bytes(), _passphrase())
    except (ValueError, TypeError) as error:
        asks = "encrypted" in str(error) or "assword" in str(error)
        return f"it has a passphrase, which {PASSPHRASE} must hold" if asks else "it is no private key in PEM form"
    curves = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
    fits = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, curves)
    return "" if fits else "it is no elliptic-curve key of the curves P-256, P-384, P-521"
