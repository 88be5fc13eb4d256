#!/bin/bash
# What the job scripts share. Sourced by them inside the job; MSER_HOME is the repository.

VERB_ARGS=() # options of the verb that a job script adds

# Modules, network, containers: the site file that MSER_SITE names (slurm/sites/), or none.
# shellcheck source=slurm/site.sh
source "$MSER_HOME/slurm/site.sh"
read_site
site_begin
MSER=${SITE_MSER:-${MSER:-$MSER_HOME/.venv/bin/mser}} # the command, on a file system that every node sees, or in the container
[ -n "$SITE_MSER" ] || command -v "$MSER" >/dev/null || {
  echo "${SLURM_JOB_NAME:-mser}: no command $MSER: run 'make install' in $MSER_HOME, or export MSER=/path/to/mser" >&2
  exit 2
}
# sbatch hands on the submitting shell's environment: ranks left there by torchrun would contradict SLURM's.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# run_on_all VERB DEFAULT_CONFIG [CONFIG] [key=value …]: one `mser VERB` process a task, all in one job step; if it fails,
# `mser requeue` decides whether SLURM starts the job again. Does not return.
# Rank, world size, master address and port are found by `mser` itself from SLURM's variables.
run_on_all() {
  local verb=$1 config=$2 code=0
  shift 2
  if [[ $# -gt 0 && $1 != *=* ]]; then
    config=$1
    shift
  fi
  local start=${SLURM_JOB_ID:-$$}-${SLURM_RESTART_COUNT:-0}
  # Compiled kernels are cached on the node and per start: jobs that share one cache, mostly on NFS, corrupt each other's,
  # and a start that was killed while it compiled leaves a lock that the next one would wait on for ever.
  local cache=${TMPDIR:-/tmp}/mser-$start
  export TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/torch_extensions
  local shared=$PWD # all nodes have to see it
  [ -w "$shared" ] || shared=$HOME
  export MSER_FIRST_CODE=$shared/.mser-$start.code
  foresee "$verb" "$config" "$@"
  # At scancel and at the time limit SLURM sends TERM to this shell too. With a trap (even an empty one, but not '', which
  # srun would inherit) it waits for srun and keeps its exit code; without one it would die first.
  trap : TERM INT USR1 USR2
  # From SLURM 22.05 on srun does not inherit --cpus-per-task. One rank's death ends the step, or its peers would hang.
  srun --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" "${SITE_SRUN[@]}" \
    bash "$MSER_HOME/slurm/task.sh" "${SITE_RUN[@]}" "$MSER" "$verb" "$config" "$@" "${VERB_ARGS[@]}" &
  local srun=$!
  # srun waits for ever for a task whose node does not answer any more: not so once another task has failed. It has no
  # part in the output, or a reader of that would wait for its last `sleep`.
  { until [ -f "$MSER_FIRST_CODE" ]; do sleep 5; done; sleep "${MSER_LINGER:-120}"; kill -KILL "$srun"; } >/dev/null 2>&1 &
  local watch=$!
  while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a signal to this shell ends `wait`, not srun
  wait "$srun" || code=$? # bash remembers it
  kill "$watch" 2>/dev/null || true
  if [ -f "$MSER_FIRST_CODE" ]; then
    code=$(<"$MSER_FIRST_CODE")
    rm -f "$MSER_FIRST_CODE"
  fi
  clean "$cache"
  ((code == 0 || code == 2)) || queue_again "$code" "$config" "$@" || code=$?
  exit "$code"
}

# foresee VERB CONFIG [key=value …]: what would fail is said by one process (`mser check`), before all ranks load for minutes;
# a start after a requeue has been through it. MSER_CHECK=0 leaves it out.
foresee() {
  local verb=$1 nodes=${SLURM_JOB_NUM_NODES:-1} code=0
  shift
  [[ $verb != features && ${MSER_CHECK:-1} != 0 && ${SLURM_RESTART_COUNT:-0} == 0 ]] || return 0
  local tasks=${SLURM_NTASKS_PER_NODE:-1}
  [ -z "${SLURM_NTASKS:-}" ] || tasks=$((SLURM_NTASKS / nodes)) # sbatch --ntasks wins over the script's --ntasks-per-node
  inside "$MSER" check "$@" --quiet --nodes="$nodes" --tasks-per-node="$tasks" || code=$?
  ((code != 2)) || exit 2
}

# inside COMMAND …: one process where the tasks run: in the container, where the site has one.
inside() {
  if [ -n "$SITE_MSER" ] && ((${#SITE_RUN[@]} == 0)); then
    # Pyxis: srun is what enters it.
    srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$OMP_NUM_THREADS" "${SITE_SRUN[@]}" "$@"
  else
    "${SITE_RUN[@]}" "$@"
  fi
}

# queue_again CODE CONFIG [key=value …]: `mser requeue` decides whether SLURM starts the job again. A container has no way to
# SLURM: there it is told what squeue says, and answers by its exit code.
queue_again() {
  if [ -z "$SITE_MSER" ]; then
    "$MSER" requeue "$@"
    return
  fi
  local id state code=0
  read -r id state < <(squeue --noheader --array --job "$SLURM_JOB_ID" --format='%A %i %T' |
    awk -v own="$SLURM_JOB_ID" '$1 == own { print $2, $3 }') || return "$1"
  inside "$MSER" requeue --state="$state" "$@" || code=$?
  ((code == 75)) || return "$1"
  scontrol requeue "$id" && sleep 60 # SLURM ends this shell; were it to end by itself, the job would count as failed
  return "$1"
}

# clean FOLDER: remove it on every node of the job. Briefly, as a job may have little time left to be queued again; a node's /tmp is not for ever.
clean() {
  rm -rf "$1"
  if ((${SLURM_JOB_NUM_NODES:-1} > 1)); then
    timeout 5 srun --quiet --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 rm -rf "$1" || true
  fi
}
