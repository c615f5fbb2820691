#!/usr/bin/env bash
# Whether anything leaves: the whole quickstart, or another command, in a network namespace without routes, with a guard
# on sockets in every Python process, under strace where it is, and with CI unset. Writes egress.json.
#
#   bash scripts/egress_check.sh                                  the quickstart; what it needs is fetched beforehand
#   bash scripts/egress_check.sh train.max_steps=4 data.train_rows=40     ... with other settings
#   bash scripts/egress_check.sh --out my.json recipe=NAME scale=rehearsal
#   bash scripts/egress_check.sh -- COMMAND ...                   any other command
#
# Exit code: 0 no attempt was made, 1 one was, 2 the check could not be made, 3 the command failed. PYTHON names another Python.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
if [ ! -x "$python" ]; then
  printf 'egress check: %s is missing.\n  Try: bash scripts/quickstart.sh, or PYTHON=/a/python with the locked packages\n' "$python" >&2
  exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/scripts/egress_check.py" "$@"
