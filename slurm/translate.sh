#!/bin/bash
# Recordings into other languages, as an array of jobs that share the work: the words of `mser translate`:
#   sbatch --array=0-15 slurm/translate.sh shards/mine shards/mine-fr --to fr,de [key=value …]
# The last job to end writes the set. A job that was pushed out or reached its time limit leaves what it has made; it, or the same
# command, goes on from there. Models on a GPU: sbatch --gpus-per-node=1 slurm/translate.sh … device=cuda, with MSER_WORKERS=1.

# ---- what is asked for; what is the same in all jobs of a cluster is in its site file (slurm/sites/) -----------------
##SBATCH --partition=gpu
##SBATCH --account=my-project
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
# ---- the same at every site ------------------------------------------------------------------------------------------
#SBATCH --job-name=mser-translate
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# SLURM runs a copy of this file from a spool folder, so the repository is looked for where the job was submitted.
MSER_HOME=${MSER_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$MSER_HOME/slurm/common.sh" ] || { echo "translate.sh: no slurm/common.sh in $MSER_HOME: submit from the repository, or export MSER_HOME" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$MSER_HOME/slurm/common.sh"
# Parts are counted from 0. To run one of eight again: sbatch --array=3 slurm/translate.sh … with MSER_PARTS=8 in the environment.
part=${SLURM_ARRAY_TASK_ID:-0}/${MSER_PARTS:-${SLURM_ARRAY_TASK_COUNT:-1}}
workers=${MSER_WORKERS:-${SLURM_CPUS_PER_TASK:-1}} # each computes in one thread
# As of pack.sh: no srun, for nothing has to be warned; SLURM queues a job that it pushed out again by itself.
[ -n "$SITE_MSER" ] || exec "$MSER" translate "$@" --part "$part" --workers "$workers"
inside "$MSER" translate "$@" --part "$part" --workers "$workers"
