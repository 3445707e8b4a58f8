#!/usr/bin/env bash
#SBATCH --job-name=vit_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vit_jax-%j.log
# Trains on the GPUs of a Slurm job, and puts the job back in the queue until it is done.
#
# One task for each GPU: under Slurm JAX gives every process the one GPU whose number is that
# of the task on its node. All tasks must see all GPUs of the node, which NCCL needs, too:
# hence --gpus-per-node, and never --gpus-per-task.
#
# Five minutes before the time is up, Slurm sends SIGTERM to the tasks (not to this shell). They
# save and exit with code 0, and then this script requeues the job.
set -euo pipefail

usage() {
  cat <<'END'
usage: sbatch [OPTIONS] launch/slurm.sh --config=FILE[:ARGUMENT] --workdir=DIR
                                        [--config.FIELD=VALUE ...]

Runs `python -m vit_jax.train` with these flags, one process for each GPU. Submit it from the
repository, in its virtual environment; DIR must be the same folder on all nodes.

  sbatch --nodes=4 launch/slurm.sh ...                                  four nodes of 8 GPUs
  sbatch --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh ...      a node of 4 GPUs

Variables:
  PYTHON   the interpreter (default: python)
END
}

PYTHON=${PYTHON:-python}

fail() {
  echo "error: $1" >&2
  exit 1
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ $1 != --help && $1 != -h ]] || { usage; exit 0; }
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is not a Slurm job: submit it, sbatch launch/slurm.sh ..."
tasks=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
gpus=${SLURM_GPUS_ON_NODE:-0}
[[ $tasks -eq $gpus ]] ||
  fail "a node has $tasks tasks and $gpus GPUs: make --ntasks-per-node and --gpus-per-node equal"

# After --config, which must come first.
[[ " $*" == *" --config.data.threads="* ]] ||
  set -- "$@" --config.data.threads="$SLURM_CPUS_PER_TASK"

output=$(mktemp)
trap 'rm -f "$output"' EXIT
# The number of CPUs is said again, as srun does not take it from the job since Slurm 22.05.
# --kill-on-bad-exit: no task waits for one that is gone.
srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  "$PYTHON" -m vit_jax.train "$@" |
  tee "$output"

# Only a job that still runs: one that was cancelled is not to come back.
if grep --quiet 'stopped by a signal, state saved' "$output" &&
  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "training is not complete: back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
