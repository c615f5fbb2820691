"""Prepared sets by their content: the address, the lock, the seal, and why a set is or is not there."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.data.card import read_card
from finetune.errors import RunError
from finetune.recipe import Recipe
from finetune.rundir import TEMPORARY, RunDir, atomic_folder, read_json, sha256_file, write_json

LAYOUT = 3
"""Raised whenever the same input would be prepared in another way."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a base that change tokens or masks."""

LIBRARIES = (
    *("transformers", "tokenizers", "jinja2", "trl", "datasets", "pyarrow"),
    *("rensa", "py3langid", "python-stdnum", "phonenumbers", "detect-secrets"),
)
"""Whose versions change what is found or made."""

ELSEWHERE = ("train_files", "heldout_files", "mixture", "benchmarks", "card", "workers")
"""Settings that enter the address by content, or not at all."""


def address_of(
    recipe: Recipe, base: Path, source: dict[str, Any], files: list[tuple[str, Path, str]]
) -> dict[str, Any]:
    """Everything that the prepared set depends on: bytes, settings, tokenizer, versions. No path, no time.

    The hashes of the user's files are also put into `source`.
    """
    from finetune import __version__
    from finetune.data.files import named, sources
    from finetune.data.tokens import vocabulary_rows

    data = recipe.data
    hashes = [[name, sha256_file(path), side] for name, path, side in files]
    if files:
        source["files"] = {name: digest for name, digest, _ in hashes}
    settings = {key: value for key, value in dataclasses.asdict(data).items() if key not in ELSEWHERE}
    named_as = named(list(data.mixture), sources([*data.train_files, *data.heldout_files]) if data.mixture else [])
    too_long = read_card(data.card).too_long if data.card and data.too_long == "auto" else data.too_long
    return {
        "layout": LAYOUT,
        "files": hashes or sorted(source["files"].items()),
        "card": source["card_sha256"] if "card_sha256" in source else "",
        "tokenizer": {name: sha256_file(base / name) for name in TOKENIZER if (base / name).is_file()},
        "embedding_rows": vocabulary_rows(base),
        "settings": settings | {"too_long": too_long},
        "mixture": {", ".join(named_as[entry]): share for entry, share in data.mixture.items()},
        "benchmarks": [[sha256_file(Path(p).expanduser()), policy] for p, policy in data.benchmarks.items()],
        "versions": {"finetune": __version__} | {name: version(name) for name in LIBRARIES},
    }


class Store:
    """One prepared set in the cache. `folder` exists when it is finished; `parts` holds what is done so far."""

    def __init__(self, root: Path, address: dict[str, Any]) -> None:
        self.root, self.address = root, address
        self.key = hashlib.sha256(json.dumps(address, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = root / self.key
        self.parts = root / f".parts-{self.key}"

    def is_ready(self) -> bool:
        """Whether the set is there, every file of the length that its seal says."""
        seal = self.folder / "seal.json"
        if not seal.is_file():
            return False
        sizes = read_json(seal)["sizes"]
        return all(
            (self.folder / n).is_file() and (self.folder / n).stat().st_size == size for n, size in sizes.items()
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the set for this process and its forks; another one waits. Ends with the last of them."""
        self.parts.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.root / f".lock-{self.key}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("data: another process prepares the same rows; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            self.parts.mkdir(parents=True, exist_ok=True, mode=0o700)
            yield
        finally:
            os.close(handle)

    def seal(self, folder: Path) -> None:
        """Notes the files of a finished set and what it depends on, and makes them read-only: runs share them."""
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(folder / "seal.json", {"sizes": sizes, "address": self.address})
        for path in folder.iterdir():
            path.chmod(0o444)

    def sweep(self) -> None:
        """Removes what is not the finished set, such as what a killed process left. Call it with the lock held."""
        for left in [*self.root.glob(f"{TEMPORARY}{self.key}-*"), self.parts]:
            shutil.rmtree(left, ignore_errors=True)


def put(prepared: Path, target: Path) -> None:
    """Puts a prepared set into a run folder: the same files by another name where the disk can, else copies."""
    with atomic_folder(target) as folder:
        for path in sorted(prepared.iterdir()):
            if path.name == "seal.json":
                continue
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


def require_unchanged(run_dir: RunDir, cache: Path) -> None:
    """Nothing, or RunError (RUN-011) when a file of rows is not the one that the data stage wrote. Reads all of them.

    `cache` is the folder of prepared sets: what is wrong with a run's file is wrong there, too, where both are one.
    """
    report = read_json(run_dir.data / "report.json")
    written = report["sha256"] if "sha256" in report else {}  # sets of older versions have none
    wrong = [
        name
        for name, digest in written.items()
        if not (run_dir.data / name).is_file() or sha256_file(run_dir.data / name) != digest
    ]
    if wrong:
        raise RunError(
            "RUN-011",
            f"{run_dir.data}: {', '.join(wrong)} is not what the data stage wrote",
            "training and scores would be of rows that the record does not know",
            f"rm -rf {run_dir.data} {Store(cache, report['address']).folder}; "
            f"python -m finetune run={run_dir.path}, which prepares them again",
        )


def explain(root: Path, address: dict[str, Any]) -> list[str]:
    """Why the cache has a set for this address, or what differs from the nearest one that it has."""
    store = Store(root, address)
    if store.is_ready():
        return [f"prepared before: {store.folder}", "files, tokenizer, settings and versions are the same."]
    mine = _flat(address)
    others = []
    for seal in sorted(root.glob("*/seal.json")):
        theirs = _flat(read_json(seal)["address"])
        others.append(
            (sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)), seal.parent, theirs)
        )
    if not others:
        return [f"not prepared yet: {root} has no set."]
    differs, folder, theirs = min(others, key=lambda other: len(other[0]))
    lines = [f"not prepared yet. The nearest of {len(others)} sets is {folder}, and differs in:"]
    return lines + [f"  {k}: there {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in differs[:20]]


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{at}.{name}".strip(".")).items()}
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return {f"{at}.{item[0]}": item[1:] for item in value}
    return {at: value}


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def decoder(base: Path) -> Any:
    """What turns ids into text, control tokens included, without importing transformers where it can."""
    path = base / "tokenizer.json"
    if not path.is_file():
        from finetune.data.tokens import load_tokenizer

        return load_tokenizer(base)
    from tokenizers import Tokenizer

    return _Decoder(Tokenizer.from_file(str(path)).decode)


@dataclasses.dataclass(frozen=True, slots=True)
class _Decoder:
    decode_ids: Callable[..., str]

    def decode(self, ids: list[int]) -> str:
        return self.decode_ids(ids, skip_special_tokens=False)
