# Training: one task per rank under srun, so that signals reach Python and the exit code is Python's own.
# With a word, which train.sbatch gives, the later stages up to that one follow in the same job.

say() { printf '%s  %s\n' "$(date '+%F %T')" "$*"; }

rank_zero() { # what the ranks find each other by
  local host
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # The node's address: its name need not resolve.
  MASTER_ADDR=$(scontrol show node "$host" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((20000 + (10 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))
  export MASTER_ADDR MASTER_PORT
  [ -n "$MASTER_ADDR" ] || { say "the address of $host is unknown to scontrol" && exit 3; }
}

# A single rank is no distributed training, and libraries must not take it for one.
# shellcheck disable=SC2016
as_rank='
  if [ "$SLURM_NTASKS" -gt 1 ]; then
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  fi
  exec "$0" -m finetune.worker train "$1"'

train() { # sets code
  local step
  rm -f "$RUN/REQUEUE"
  # srun leaves out --cpus-per-task since Slurm 22.05 unless it is told again.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
  srun --export=ALL --mpi=none --kill-on-bad-exit=1 bash -c "$as_rank" "$PYTHON" "$RUN" &
  step=$!
  trap 'say "Slurm warns: the ranks save a checkpoint"; kill -USR1 $step' USR1 # srun hands it on to every task
  trap : TERM                                                                 # the tasks get their own
  while :; do
    wait $step
    kill -0 $step 2>/dev/null || break
  done
  wait $step # the one before may have been cut short by a trap
  code=$?
  trap '' USR1
  trap - TERM
}

requeue() { # the same job once more, unless somebody has cancelled it
  local state
  state=$(scontrol show job "$SLURM_JOB_ID" --oneliner | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
  if [ "$state" = RUNNING ]; then
    say "stopped early with a checkpoint: $(cat "$RUN/REQUEUE"); queued again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
  fi
  say "not queued again by this script: Slurm says $state"
  exit 1 # never 0: the jobs that wait for this one would begin
}

trained() { # an adapter, or with adapter=full the base's own weights
  { [ -e "$RUN/adapter" ] || [ -e "$RUN/tuned" ]; } && [ -e "$RUN/train.json" ]
}

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, $RUN"
if trained; then
  say "train: done before"
  rm -f "$RUN/REQUEUE"
else
  rank_zero
  train
  [ "$code" = 0 ] || { say "training failed with exit code $code" && exit "$code"; }
  # A signal during the last update: nothing is left to train, and no stage follows in this job.
  if trained && [ $# = 0 ]; then rm -f "$RUN/REQUEUE"; fi
  [ ! -e "$RUN/REQUEUE" ] || requeue
fi
[ $# = 0 ] || exec "$PYTHON" -m finetune "$1" run="$RUN" --here
