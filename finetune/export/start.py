"""The start line of a server, as a script for whoever has only the export: `vllm_start(folder, name)`."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune import OFFLINE
from finetune.start_lines import QUIET, Order, Server, command

HEAD = """\
#!/bin/sh
# Serves the model beside this folder with vLLM, on this machine alone and offline: http://127.0.0.1:$PORT/v1
# PYTHON is a Python that has vLLM. Further words go to vLLM: sh start.sh --max-model-len 8192
set -eu
cd "$(dirname "$0")/.."
"""


def vllm_start(folder: Path, name: str) -> str:
    """The text of a script that starts vLLM with the model in `folder`, by the words that we start it with."""
    words, _ = command(Server("vllm", "", "PYTHON", "vllm"), Order(model=folder, port=8000, name=name))
    given = {str(folder.resolve()): folder.name, "PYTHON": '"${PYTHON:-python}"', "8000": '"${PORT:-8000}"'}
    line = " ".join(given[word] if word in given else shlex.quote(word) for word in words)
    quiet = {**OFFLINE, **QUIET}
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in sorted(quiet.items()))
    return f'{HEAD}{exports}exec {line} "$@"\n'
