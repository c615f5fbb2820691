# What a sweep found, as sweep.md, sweep.json and sweep.png beside the links to its runs, when the last task has ended.

printf '%s  job %s: the table of %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$RUN"
exec "$PYTHON" -m finetune table run="$RUN"
