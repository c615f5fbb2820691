# One later stage, $1, on one node. Its own failure, or a gate that is not met, ends the jobs that wait for it.
# A stage that Slurm stops begins again: it writes nothing half.

printf '%s  job %s: %s of %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$1" "$RUN"
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
exec "$PYTHON" -m finetune "$1" run="$RUN" --here
