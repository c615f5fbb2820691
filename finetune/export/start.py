"""How each export is started, and what its client said: `vllm_start(folder, name)`, `add_clients(readme, ...)`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import OFFLINE
from finetune.recipe import Recipe
from finetune.rundir import write_text
from finetune.start_lines import QUIET, STARTS, Order, Server, command

HEAD = """\
#!/bin/sh
# Serves the model beside this folder with vLLM, on this machine alone and offline: http://127.0.0.1:$PORT/v1
# PYTHON is a Python that has vLLM. Further words go to vLLM: sh start.sh --max-model-len 8192
set -eu
cd "$(dirname "$0")/.."
"""


def add_clients(readme: Path, recipe: Recipe, told: Sequence[dict[str, Any]]) -> None:
    """Adds to an export's README how its formats are started, and which programs loaded and answered what."""
    lines = [text + "\n" for name, text in STARTS.items() if name in recipe.export.formats]
    lines += ["## Which programs were asked", ""]
    if told:
        lines += ["| what | by | same first token | same text | log-probabilities apart |", "|---|---|---|---|---|"]
    for entry in told:
        if not entry["asked"]:
            continue
        gap = "not given" if entry["mean_gap"] is None else f"{entry['mean_gap']:.4f} nats on {entry['tokens']} tokens"
        client = f"{entry['client']} {entry['version']}"
        shares = f"{entry['same_first']:.0%} of {entry['prompts']} | {entry['same_text']:.0%}"
        lines.append(f"| {entry['format']} | {client} | {shares} | {gap} |")
    lines.append("")
    lines += [f"- {e['format']}: {e['client']} was not asked: {e['why']}" for e in told if not e["asked"]]
    if not told:
        lines.append("None: export.ask=false.")
    write_text(readme, readme.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(lines).rstrip() + "\n")


def vllm_start(folder: Path, name: str) -> str:
    """The text of a script that starts vLLM with the model in `folder`, by the words that we start it with."""
    words, _ = command(Server("vllm", "", "PYTHON", "vllm"), Order(model=folder, port=8000, name=name))
    given = {str(folder.resolve()): folder.name, "PYTHON": '"${PYTHON:-python}"', "8000": '"${PORT:-8000}"'}
    line = " ".join(given[word] if word in given else shlex.quote(word) for word in words)
    quiet = {**OFFLINE, **QUIET}
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in sorted(quiet.items()))
    return f'{HEAD}{exports}exec {line} "$@"\n'
