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

The results are in $root/$run. Open report.html there in a browser. From $root:

  .venv/bin/python -m finetune chat run=$run      talk to it, its base beside it
  .venv/bin/python -m finetune verify run=$run    is it still what its record says?
END
