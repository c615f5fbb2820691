"""Hub repositories at one commit: safetensors, settings and tokenizer, never code and never a pickle."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from finetune import OFFLINE
from finetune.fetch import noted
from finetune.fetch.child import NO_NETWORK, FetchError, disk_full, last_line, locked, no_space, run_child, writing
from finetune.foreign.configs import find_code, read_settings, settings_files, without_code
from finetune.rundir import TEMPORARY, read_json, sha256_file, sha256_tree, write_json

HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)
"""What is taken from a hub repository: weights, settings, tokenizer, licence. Never code, never a pickle."""

MANIFEST = ".sha256.json"
"""Written last into a fetched hub folder: relative path -> sha256. A folder without it is not finished."""


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
            "network=true to fetch it, or copy its files into a folder and give model.source=/that/folder",
        )
    with writing(target.parent), locked(target.parent / f".lock-{target.name}"):
        if _damaged(target, verify) is not None:
            _hub_download(repo, revision, target)
    return target


def _hub_download(repo: str, revision: str, target: Path) -> None:
    # The partial folder has a fixed name: a download of many hours goes on where it was interrupted.
    partial = target.with_name(f"{TEMPORARY}{target.name}")
    program = (
        "import json; from huggingface_hub import snapshot_download\n"
        "repo, revision, folder, files = sys.argv[1:]\n"
        "snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=json.loads(files))"
    )
    lifted = {**OFFLINE, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    log = partial.with_name(f"{partial.name}-hosts")
    words = noted.watched(program, log, [repo, revision, str(partial), json.dumps(HUB_FILES)])
    code, text = run_child(words, lifted, f"fetching {repo} at {revision[:12]}", partial)
    if code != 0:
        raise _hub_error(text, repo, revision, target)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    files = sha256_tree(partial)
    noted.note(target.parent.parent, f"{repo} {revision}", {name: partial / name for name in files}, log, files)
    log.unlink(missing_ok=True)
    leave_code_out(partial)
    write_json(partial / MANIFEST, sha256_tree(partial))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def leave_code_out(folder: Path) -> None:
    """Takes the keys that would load code out of the settings in a folder, and says which.

    Publishers whose models were once not part of transformers leave `auto_map` in config.json; what it names is neither
    fetched nor needed. The hashes in the manifest are those of the files without it.
    """
    for path in settings_files(folder):
        try:
            value = read_settings(path)
        except (ValueError, RecursionError):
            continue  # `foreign.check_folder` refuses it
        if keys := find_code(value):
            write_json(path, without_code(value))
            what = f"{path.name}: {', '.join(keys)} left out, which would load code of the publisher"
            print(what, file=sys.stderr, flush=True)


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


def _hub_error(text: str, repo: str, revision: str, target: Path) -> FetchError:
    if disk_full(text):
        return no_space(target.parent)
    if re.search(r"GatedRepo|401 Client|403 Client", text):
        return FetchError(
            "FET-012",
            f"{repo} is closed to this machine",
            "its publisher wants its terms accepted first",
            "accept them on the model's page, then `hf auth login` here",
        )
    if re.search(r"RepositoryNotFound|RevisionNotFound|404 Client", text):
        return FetchError(
            "FET-009", f"the hub has no {repo} at {revision}", last_line(text), "model.source, model.revision"
        )
    if NO_NETWORK.search(text) or "LocalEntryNotFound" in text:
        why = last_line(text, NO_NETWORK)
        return FetchError(
            "FET-003", f"the hub cannot be reached to fetch {repo}", why, "model.source=/folder with its files"
        )
    return FetchError("FET-011", f"{repo} could not be fetched", last_line(text), "repeat: what has arrived is kept")
