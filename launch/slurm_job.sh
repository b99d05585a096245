# Runs a module as a Slurm job, and requeues the job if a signal stopped it. Sourced by slurm.sbatch and sweep.sbatch.
# shellcheck shell=bash

export ACCELERATOR=${ACCELERATOR:-cuda13}
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The job, or one member of an array: SLURM_JOB_ID of its last member stands for all of them.
job=${SLURM_JOB_ID:-}
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# Whether Slurm decides at the job's end whether to requeue it, by its PreemptMode: from 24.05 on, if the job was
# preempted. Requeued by the script as well, it would run once more after it is done.
requeues_by_itself() {
  local version first=24.05
  version=$(scontrol --version)
  [[ ${version##* } > $first && $(scontrol show job "$job") == *PreemptTime=[0-9]* ]]
}

# run_job MODULE ARGUMENT...: --dry-run among the arguments prints the options of the script and the command instead.
run_job() {
  # music_jax ends all processes of a run when one fails; Slurm would kill them while they save. --wait: if a node is
  # lost and Slurm does not notice, srun would wait for its processes until the time limit.
  local command=(srun --kill-on-bad-exit=0 --wait=300) argument dry_run='' code=0 state
  # From Slurm 22.05 on, srun does not inherit --cpus-per-task from sbatch.
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then command+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
  command+=("$venv/bin/python" -m)
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then dry_run=1; else command+=("$argument"); fi
  done
  if [[ -n $dry_run ]]; then
    grep '^#SBATCH' "$0"
    printf '%q ' "${command[@]}"
    echo
    exit
  fi

  # The shell may be signaled too, and must outlive its processes.
  trap : TERM
  # Runs once for all nodes.
  ensure_environment requirements.txt
  "${command[@]}" || code=$?
  # 75: a signal stopped the run, and everything is saved, or results of other members of a sweep are missing. 143:
  # SIGTERM ended Python before it could handle signals.
  if ((code == 75 || code == 143)); then
    # A canceled job is completing instead of running.
    state=$(squeue --noheader --jobs="$job" --format=%T) || state=RUNNING
    if [[ $state != RUNNING ]]; then
      echo "stopped; the job is $state: not requeued" >&2
    elif [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && ((${SLURM_RESTART_COUNT:-0} >= 100)); then
      echo "stopped after 100 restarts: not requeued; submit the array again" >&2
    elif requeues_by_itself; then
      echo "stopped by a preemption; Slurm requeues the job, unless its PreemptMode is CANCEL" >&2
    else
      echo "stopped; requeueing" >&2
      scontrol requeue "$job"
    fi
  fi
  exit "$code"
}
