#!/bin/bash
# What a frozen encoder makes of the clips of a stage 1, a stage 2 or an evaluation, ahead of it, as an array of jobs:
#   sbatch slurm/features.sh [CONFIG] [key=value …]
# CONFIG is a preset's name or a YAML file. What sbatch is told on its command line overrides the lines below. The jobs share the
# work and the folder: MSER_FEATURES in the site file, or encoder.cache_dir. The run that is to read it: --dependency=afterok:JOBID

# ---- what is asked for; what is the same in all jobs of a cluster is in its site file (slurm/sites/) -----------------
##SBATCH --partition=gpu
##SBATCH --account=my-project
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=4:00:00
# ---- the same at every site ------------------------------------------------------------------------------------------
#SBATCH --job-name=mser-features
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# What is encoded is kept every few minutes, and all of it at the signal before the time limit; the job is then queued again.
#SBATCH --signal=USR2@180
#SBATCH --kill-on-invalid-dep=yes
set -euo pipefail

# SLURM runs a copy of this file from a spool folder, so the repository is looked for where the job was submitted.
MSER_HOME=${MSER_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$MSER_HOME/slurm/common.sh" ] || { echo "features.sh: no slurm/common.sh in $MSER_HOME: submit from the repository, or export MSER_HOME" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$MSER_HOME/slurm/common.sh"
# Parts are counted from 0. To run one of eight again: sbatch --array=3 slurm/features.sh … with MSER_PARTS=8 in the environment.
VERB_ARGS=(--part "${SLURM_ARRAY_TASK_ID:-0}/${MSER_PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}")
run_on_all features whisper-large-v3_llama3-8b_stage1 "$@"
