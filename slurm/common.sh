#!/bin/bash
# What stage1.sh and stage2.sh share. Sourced by them inside the job; MSER_HOME is the repository.

# ---- SITE SETTINGS: the environment ----------------------------------------------------------------------------------
# module load cuda gcc                          # what your site offers; the compiler builds DeepSpeed's fused optimizers
MSER=${MSER:-$MSER_HOME/.venv/bin/mser}         # the command, on a file system that every node sees
SRUN_ARGS=()                                    # e.g. (--container-image=/images/mser.sqsh --container-mounts=/data)
# export NCCL_SOCKET_IFNAME=ib0                 # the network card for NCCL's set-up, where a node has several
# export GLOO_SOCKET_IFNAME=ib0                 # the same for gloo (CPU runs)
# export NCCL_IB_HCA=mlx5                       # the InfiniBand adapters to use
# export HF_HOME=/shared/huggingface            # models fetched beforehand …
# export HF_HUB_OFFLINE=1                       # … where compute nodes have no way out
# export MLFLOW_TRACKING_URI=http://mlflow:5000 # default: mlflow.db beside the run folder

# run_training DEFAULT_CONFIG [CONFIG] [key=value …]: one `mser train` process a task, all in one job step.
# Rank, world size, master address and port are found by `mser train` itself from SLURM's variables.
run_training() {
  local config=$1
  shift
  if [[ $# -gt 0 && $1 != *=* ]]; then
    config=$1
    shift
  fi
  command -v "$MSER" >/dev/null || {
    echo "${SLURM_JOB_NAME:-mser}: no command $MSER: run 'make install' in $MSER_HOME, or export MSER=/path/to/mser" >&2
    exit 2
  }
  # sbatch hands on the submitting shell's environment: ranks left there by torchrun would contradict SLURM's.
  unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  # Compiled kernels are cached on the node and per job: jobs that share one cache, mostly on NFS, corrupt each other's.
  local cache=${TMPDIR:-/tmp}/mser-${SLURM_JOB_ID:-$$}
  export TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/torch_extensions
  # From SLURM 22.05 on srun does not inherit --cpus-per-task. One rank's death ends the step, or its peers would hang.
  exec srun --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" "${SRUN_ARGS[@]}" "$MSER" train "$config" "$@"
}
