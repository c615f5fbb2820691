"""What a server loads: `export(run_dir)` leaves export/ with a folder per format, each asked by its client.

| format | what | asked by |
|---|---|---|
| `hf` | the merged weights, as stock transformers loads them | transformers |
| `peft` | the adapter as it was trained | transformers and PEFT |
| `peft_per_expert` | the adapter with a pair per expert and map | vLLM where it can, llama.cpp as GGUF |
| `gguf` | the merged weights for llama.cpp, in the types of `export.gguf` | llama.cpp |
| `ollama` | a Modelfile for the GGUF file | nobody here |
| `vllm` | a start line for `hf` | vLLM, started by the words of that line |
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import sealed
from finetune.check import GGUF_TYPES
from finetune.compose import read_recipe
from finetune.errors import WeightsError
from finetune.export.asked import Clients, limits_of
from finetune.export.card import export_name
from finetune.export.chats import check_tokenizer, end_of_turn, stop_tokens
from finetune.export.config import write_served
from finetune.export.converter import Converter, converter, quantise
from finetune.export.ollama import modelfile
from finetune.export.papers import lacking, require_permits, write_papers
from finetune.export.per_expert import write_per_expert
from finetune.export.start import add_clients, vllm_start
from finetune.families import Family, family_of
from finetune.fetch import llama_cpp
from finetune.foreign import check_folder
from finetune.parity import Parity
from finetune.recipe import Recipe
from finetune.rundir import RunDir, atomic_folder, read_json, write_json, write_text

PEFT_LIMIT_GIB = 4.0
"""Bases up to this size are loaded again to ask the adapter as stock PEFT applies it; the merge has asked it before."""


SAMPLING = ("temperature", "top_p", "top_k")
"""What a Modelfile takes over from the model's settings for generation."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every format needs to know."""

    run_dir: RunDir
    """The run."""
    recipe: Recipe
    """Its settings."""
    family: Family
    """The family of its base."""
    base: Path
    """The base's folder."""
    folder: Path
    """Where the export is written."""
    clients: Clients
    """Who asks it."""
    name: str
    """What the model is called."""


def export(run_dir: RunDir) -> None:
    """Writes export/ of a run: the formats the recipe names, clients.json, parity.json, and the papers.

    The merge has proved that its weights are what was trained; without it there is nothing to export. Raises
    RecipeError (LIC-00x) where a licence forbids it, and GateError (exit code 4): EXP-020 and EXP-021 when the
    tokenizer does not write or stop as in training, EXP-030 and EXP-031 when a client answers otherwise than the
    adapter or cannot load a format. Adapter and merged weights stay. Raises RunError MRG-015 when a byte of either is
    not what the merge has proved.
    """
    from rich.console import Console
    from transformers import AutoTokenizer

    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    run_dir.require(run_dir.trained, "train")
    console = Console()
    base = base_folder(recipe)
    require_permits(run_dir, recipe, base)
    parity = Parity.read(run_dir.require(run_dir.parity, "merge"))
    sealed.refuse(run_dir)
    with atomic_folder(run_dir.export) as folder:
        trained = AutoTokenizer.from_pretrained(base, local_files_only=True)
        clients = Clients(
            answers=read_json(run_dir.require(run_dir.answers, "merge")),
            tokenizer=trained,
            logs=run_dir.logs,
            say=lambda line: console.print(line, highlight=False, soft_wrap=True),
            here=recipe.model.tiny,
        )
        family = family_of(read_json(base / "config.json"))
        job = Job(run_dir, recipe, family, base, folder, clients, export_name(run_dir, recipe))
        notes: dict[str, Any] = {}
        for name, write in FORMATS.items():
            if name in recipe.export.formats:
                notes[name] = write(job)
        for name in sorted({"hf", "peft", "peft_per_expert"} & set(recipe.export.formats)):
            check_folder(folder / name, WeightsError)  # what we would not load we do not give away
        if "hf" in recipe.export.formats:
            write_json(folder / "parity.json", parity.as_dict())
        write_json(folder / "clients.json", {"schema": 1, "clients": clients.told, "formats": notes})
        write_papers(run_dir, recipe, base, folder)
        add_clients(folder / "README.md", recipe, clients.told)
    for sentence in lacking(recipe, base):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def hf(job: Job) -> dict[str, Any]:
    """The merged weights with the config that servers want, and the tokenizer, checked."""
    folder = job.folder / "hf"
    link_tree(job.run_dir.merged, folder)
    for path in (job.run_dir.parity, job.run_dir.answers):  # held-out rows are not given away
        (folder / path.name).unlink(missing_ok=True)
    added = write_served(folder, job.family)
    tokens = check_tokenizer(job.base, folder)
    if job.recipe.export.ask:
        job.clients.transformers("hf", folder)
    return {"fields_added": added, "tokenizer": tokens}


def peft(job: Job) -> dict[str, Any]:
    """The adapter as it is."""
    folder = job.folder / "peft"
    link_tree(job.run_dir.adapter, folder)
    size_gib = sum(path.stat().st_size for path in job.base.glob("*.safetensors")) / 2**30
    if not job.recipe.export.ask:
        return {}
    if size_gib <= PEFT_LIMIT_GIB:
        job.clients.transformers("peft", job.base, folder)
    else:
        job.clients.not_asked("peft", "peft", f"the base has {size_gib:.0f} GiB; the merge's proof has asked it")
    return {}


def peft_per_expert(job: Job) -> dict[str, Any]:
    """The adapter with a pair per expert and map, and where llama.cpp may have it, as GGUF beside it."""
    folder = job.folder / "peft_per_expert"
    done = write_per_expert(job.base, job.run_dir.adapter, folder)
    if job.recipe.export.ask:
        job.clients.vllm("peft_per_expert", job.base, folder, experts=bool(job.family.experts))
    if not job.recipe.export.gguf_adapter:
        return done
    target = job.folder / "gguf_adapter" / f"{job.name}-adapter.gguf"
    tool = _converter(job)
    tool.adapter(job.base, folder, target, job.family)
    if job.recipe.export.ask:
        with tempfile.TemporaryDirectory(prefix="finetune-base-", dir=job.folder) as place:
            base = Path(place) / "base-f16.gguf"
            tool.model(job.base, base, "f16", job.family)
            job.clients.llama_cpp("peft_per_expert as GGUF", base, limits_of("f16"), adapter=target)
    return done | {"gguf_adapter": str(target.relative_to(job.folder))}


def gguf(job: Job) -> dict[str, Any]:
    """The merged weights as GGUF files."""
    tool = _converter(job)
    folder = job.folder / "gguf"
    files: dict[str, str] = {}
    for kind in job.recipe.export.gguf:
        target = folder / f"{job.name}-{kind}.gguf"
        job.clients.say(f"gguf: writing {target.name} (log: {tool.log}) ...")
        if kind in GGUF_TYPES:
            tool.model(job.run_dir.merged, target, kind, job.family)
        else:
            with tempfile.TemporaryDirectory(prefix="finetune-f16-", dir=job.folder) as place:
                whole = next((folder / name for name in files.values() if name.endswith("-f16.gguf")), None)
                if whole is None:
                    whole = Path(place) / "f16.gguf"
                    tool.model(job.run_dir.merged, whole, "f16", job.family)
                quantise(whole, target, kind, tool.log)
        files[kind] = target.name
        if job.recipe.export.ask:
            job.clients.llama_cpp(f"gguf {kind}", target, limits_of(kind))
    return {"files": files, "converter": f"llama.cpp's, of llama-cpp-python {llama_cpp.VERSION}"}


def ollama(job: Job) -> dict[str, Any]:
    """A Modelfile for the first GGUF file."""
    tokenizer = job.clients.tokenizer
    ids = stop_tokens(job.run_dir.merged, tokenizer) | {end_of_turn(tokenizer)}
    stops = sorted(tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None)
    weights = f"../gguf/{job.name}-{job.recipe.export.gguf[0]}.gguf"
    settings = job.run_dir.merged / "generation_config.json"
    said = read_json(settings) if settings.is_file() else {}
    sampling = {key: said[key] for key in SAMPLING if key in said and said[key] is not None}
    text = modelfile(tokenizer, weights, stops, sampling)
    if not text:
        why = "its chat template cannot be written in Ollama's words, and a wrong one would be worse than none"
        write_text(job.folder / "ollama" / "README.md", f"No Modelfile: {why}. llama.cpp itself reads the template.\n")
        job.clients.not_asked("ollama", "ollama", why)
        return {"template": why}
    write_text(job.folder / "ollama" / "Modelfile", text)
    job.clients.not_asked("ollama", "ollama", f"not tried here: cd ollama && ollama create {job.name} -f Modelfile")
    return {"template": "writes five fixed conversations as the chat template does"}


def vllm(job: Job) -> dict[str, Any]:
    """A start line for vLLM: the one by which it is asked, with what depends on the machine as variables."""
    folder, asked = job.folder / "hf", job.clients
    context = max(asked.context(), job.recipe.data.max_length)
    text = vllm_start(folder, job.name, dtype=asked.dtype(), context=context)
    write_text(job.folder / "vllm" / "start.sh", text)
    (job.folder / "vllm" / "start.sh").chmod(0o755)
    if job.recipe.export.ask:
        asked.vllm("vllm", folder, name=job.name, context=context)
    return {}


FORMATS = {
    "hf": hf,
    "peft": peft,
    "peft_per_expert": peft_per_expert,
    "gguf": gguf,
    "ollama": ollama,
    "vllm": vllm,
}
"""Format -> what writes and asks it, in the order in which they are made."""


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder that shares the files' bytes on disk where the file system allows it."""

    def link(from_: str, to: str) -> None:
        try:
            os.link(from_, to)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(from_, to)

    shutil.copytree(source, target, copy_function=link)


def _converter(job: Job) -> Converter:
    return converter(job.recipe, job.run_dir.logs / "converter.log")
