#!/bin/bash
# What a site file may set (slurm/sites/README.md), read by `submit.sh` where a job is submitted and by `common.sh` inside it.
# Sourced by them.
# shellcheck disable=SC2034,SC2317 # what it sets is for them

# read_site: the settings of the file $MSER_SITE, or those of a site that needs none.
read_site() {
  SITE_SBATCH=()                   # more options of sbatch, each one word: --key=value
  SITE_GPUS='--gpus-per-node=%n'   # how GPUs are asked for; %n is their number on a node
  SITE_NODE_GPUS=''                # how many a node has, where a job script asks for more
  SITE_SRUN=()                     # more options of srun
  SITE_RUN=()                      # the words in front of the command in each task: a container's runner
  SITE_MSER=''                     # the command `mser` inside the container; empty: there is no container
  site_begin() { :; }              # lines of the job, before anything starts: modules, network, shared places
  [ -n "${MSER_SITE:-}" ] || return 0
  [ -f "$MSER_SITE" ] || {
    echo "${SLURM_JOB_NAME:-mser}: MSER_SITE=$MSER_SITE is no file: give the path of a site file, e.g. slurm/sites/bare.sh" >&2
    exit 2
  }
  # shellcheck source=slurm/sites/bare.sh
  source "$MSER_SITE" || {
    echo "${SLURM_JOB_NAME:-mser}: the site file $MSER_SITE ended with an error: mend the line above" >&2
    exit 2
  }
  local name known=' SITE_SBATCH SITE_GPUS SITE_NODE_GPUS SITE_SRUN SITE_RUN SITE_MSER '
  for name in "${!SITE_@}"; do
    [[ $known == *" $name "* ]] || {
      echo "${SLURM_JOB_NAME:-mser}: $MSER_SITE sets $name, which nothing reads: the names are${known% }" >&2
      exit 2
    }
  done
  # GPUs asked for by the task are bound to it: each task would see one alone, and NCCL finds no NVLink to those it does not
  # see. Without these variables srun hands the job's GPUs to all tasks (--gpu-bind=none would hide them all in SLURM 22.05).
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND SLURM_GPU_BIND
}
