#!/bin/bash
# Stage 1 (contrastive alignment) as a SLURM job:
#   sbatch slurm/stage1.sh [CONFIG] [key=value …]
# CONFIG is a preset's name or a YAML file. What sbatch is told on its command line overrides the lines below.

# ---- what is asked for; what is the same in all jobs of a cluster is in its site file (slurm/sites/) -----------------
##SBATCH --partition=gpu
##SBATCH --account=my-project
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# ---- the same at every site ------------------------------------------------------------------------------------------
#SBATCH --job-name=mser-stage1
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Three minutes before the time limit every rank gets USR2, saves, and the job is queued again. More for a slow disk.
#SBATCH --signal=USR2@180
set -euo pipefail

# SLURM runs a copy of this file from a spool folder, so the repository is looked for where the job was submitted.
MSER_HOME=${MSER_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$MSER_HOME/slurm/common.sh" ] || { echo "stage1.sh: no slurm/common.sh in $MSER_HOME: submit from the repository, or export MSER_HOME" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$MSER_HOME/slurm/common.sh"
run_on_all train whisper-large-v3_llama3-8b_stage1 "$@"
