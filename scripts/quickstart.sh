#!/usr/bin/env bash
# From a bare machine to a tuned model: makes .venv, fetches a small real model and real licence texts, trains, compares,
# merges, exports. Extra words change the recipe, e.g. `bash scripts/quickstart.sh train.max_steps=20`.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_venv.sh"

set_up
cd -- "$root"
.venv/bin/python -m finetune recipe=legal_quickstart "$@"

run=$(find runs/legal_quickstart -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' 2>/dev/null | sort | tail -n 1)
[ -n "$run" ] || exit 0 # runs_dir= or name= was among the words: the program has said where the results are
cat <<END

Where to look, in $root:
  $run/report.html   what changed: plots, tables, base and tuned side by side
  $run/scores.json   the same in figures
  $run/export/       what a server loads
  $run/run.json      the record: hashes of every input and output

Talk to it:      .venv/bin/python -m finetune chat run=$run
Check it again:  .venv/bin/python -m finetune verify run=$run
END
