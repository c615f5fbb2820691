#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, format, types, import layers, spelling, tests.
# With words it is pytest alone, with them: `bash scripts/test.sh -m slurm`, `bash scripts/test.sh tests/test_merge.py -x`.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

set_up test
# Threads that wait must leave the cores to others: on a shared machine spinning ones are many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
cd -- "$root"

failed=()
check() { # name, then the command: all of them run, so that one call shows everything
  say "--- $1"
  "${@:2}" || failed+=("$1")
}

python=.venv/bin/python
if [ $# -eq 0 ]; then
  check "lint" "$python" -m ruff check
  check "format" "$python" -m ruff format --check
  check "types" "$python" -m mypy
  check "layers" "$python" -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())'
  check "spelling" "$python" -m codespell_lib
  # All tests at once are shared out among processes, a file to one of them; named ones run in turn, to be watched.
  set -- -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
check "tests" "$python" -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
  say "Failed: ${failed[*]}"
  exit 1
fi
say "All checks passed."
