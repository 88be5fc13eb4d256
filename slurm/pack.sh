#!/bin/bash
# Corpus → shards as a SLURM job: the words of `mser pack`, on one node, without GPUs:
#   sbatch slurm/pack.sh emodb data/emodb shards/emodb
# A job that was pushed out or reached its time limit leaves its finished shards; it, or the same command, goes on from there.

# ---- what is asked for; what is the same in all jobs of a cluster is in its site file (slurm/sites/) -----------------
##SBATCH --partition=gpu
##SBATCH --account=my-project
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
# ---- the same at every site ------------------------------------------------------------------------------------------
#SBATCH --job-name=mser-pack
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# SLURM runs a copy of this file from a spool folder, so the repository is looked for where the job was submitted.
MSER_HOME=${MSER_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$MSER_HOME/slurm/common.sh" ] || { echo "pack.sh: no slurm/common.sh in $MSER_HOME: submit from the repository, or export MSER_HOME" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$MSER_HOME/slurm/common.sh"
# No srun: a preemption's warning goes to job steps alone, and this needs none. It packs on until SLURM takes the node, and
# SLURM queues it again by itself.
[ -n "$SITE_MSER" ] || exec "$MSER" pack "$@"
inside "$MSER" pack "$@"
