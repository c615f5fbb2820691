"""Weights and adapters as GGUF files, by llama.cpp's own converter: `Converter(...).model(...)`, `.adapter(...)`.

The converter is Python in the sources of the package llama-cpp-python, pinned by hash and unpacked into the cache. It
runs in a child process with our libraries, offline, and reads a folder that shows it the files of the model under a
config.json in the words it knows (`Family.converter_config`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetune import OFFLINE, fetch, machine
from finetune.errors import WeightsError
from finetune.export.config import text_fields
from finetune.families import Family
from finetune.recipe import Recipe
from finetune.rundir import atomic_file, read_json, write_json


@dataclass(frozen=True, slots=True)
class Converter:
    """The unpacked converter."""

    folder: Path
    """Where its scripts are."""
    log: Path
    """What it says is added to this file."""

    def model(self, source: Path, target: Path, kind: str, family: Family) -> None:
        """Writes the model in `source` as the GGUF file `target` of type `kind`, one of `check.GGUF_TYPES`.

        Raises WeightsError EXP-010 with the converter's last words.
        """
        with tempfile.TemporaryDirectory(prefix="finetune-gguf-") as staged, atomic_file(target) as partial:
            seen = Path(staged) / target.stem
            stage(source, seen, family)
            child = [sys.executable, "-m", "finetune.export.converter_child", str(self.folder), pre_tokenizer(seen)]
            self._run([*child, "--outtype", kind, "--outfile", str(partial), str(seen)], target)

    def adapter(self, base: Path, source: Path, target: Path, family: Family) -> None:
        """Writes the adapter in `source`, one pair per expert and map, as a GGUF file for the model in `base`.

        Raises WeightsError EXP-010 with the converter's last words.
        """
        with tempfile.TemporaryDirectory(prefix="finetune-gguf-") as staged, atomic_file(target) as partial:
            seen = Path(staged) / "base"
            stage(base, seen, family)
            script = [sys.executable, str(self.folder / "convert_lora_to_gguf.py")]
            words = ["--outtype", "f32", "--outfile", str(partial), "--base", str(seen), str(source)]
            self._run([*script, *words], target)

    def _run(self, words: list[str], target: Path) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n{target.name}\n")
            log.flush()
            start = log.tell()
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | OFFLINE
            )
            log.seek(start)
            said = [line.strip() for line in log if line.strip()]
        if done.returncode != 0:
            why = said[-1] if said else f"it ended with {done.returncode}"
            raise WeightsError("EXP-010", f"llama.cpp's converter made no {target.name}", why[:300], f"see {self.log}")


def converter(recipe: Recipe, log: Path) -> Converter:
    """The converter, fetched on first use where the recipe allows the network. Raises FetchError."""
    return Converter(fetch.fetch_converter(fetch.cache_folder(recipe), network=recipe.network), log)


def stage(source: Path, target: Path, family: Family) -> None:
    """A folder of links to the files in `source`, with a config.json in the words the converter knows."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", "README.md"):
            (target / path.name).symlink_to(path.absolute())
    config = read_json(source / "config.json")
    write_json(target / "config.json", text_fields(config, family, family.converter_config))


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name of how the tokenizer in `folder` cuts text before it merges, for two plain ways; else empty.

    The converter knows tokenizers by a hash that covers the vocabulary, so it cannot know one of your own. These two
    ways are exactly what llama.cpp does under their names.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return ""
    described = json.loads(path.read_text(encoding="utf-8"))
    if described["model"]["type"] != "BPE" or described.get("normalizer"):
        return ""
    how = described["pre_tokenizer"] or {"type": ""}
    steps = how["pretokenizers"] if how["type"] == "Sequence" else [how]
    last, before = steps[-1], steps[:-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or not last["use_regex"]:
        return ""
    if not before:
        return "gpt-2"
    return "smollm" if before == [{"type": "Digits", "individual_digits": True}] else ""


def quantise(source: Path, target: Path, kind: str, log: Path) -> None:
    """Writes the f16 GGUF file `source` as `target` in a smaller type such as q4_k_m. Raises WeightsError EXP-010."""
    with atomic_file(target) as partial:
        Converter(source.parent, log)._run([*machine.quantiser(), str(source), str(partial), kind.upper()], target)
