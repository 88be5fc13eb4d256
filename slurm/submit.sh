#!/bin/bash
# sbatch, with what this site wants to be told: the words of sbatch, and the site file by $MSER_SITE or --site=FILE in front.
#   MSER_SITE=slurm/sites/bare.sh slurm/submit.sh [options of sbatch] slurm/stage1.sh [CONFIG] [key=value …]
#   slurm/submit.sh --site=slurm/sites/bare.sh --show --nodes=2 slurm/stage1.sh    # shows the command and the script's changed lines
# The site's options come first, so that those of the command line win; GPUs are asked for in the site's own way.
set -euo pipefail

MSER_HOME=${MSER_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=slurm/site.sh
source "$MSER_HOME/slurm/site.sh"
fail() {
  echo "submit.sh: error: $*" >&2
  exit 2
}

show='' gpus='' tasks='' options=()
while (($#)) && [[ $1 == -* || $1 != *.sh ]]; do
  case $1 in
  --site=*) MSER_SITE=${1#*=} ;;
  --show) show=yes ;;
  --gpus-per-node=*) gpus=${1#*=} ;;
  --ntasks-per-node=*) tasks=${1#*=} options+=("$1") ;;
  --gpus-per-node | --ntasks-per-node | --site) fail "write $1=…, in one word" ;;
  *) options+=("$1") ;;
  esac
  shift
done
(($#)) || fail "no job script among the words: submit.sh [options of sbatch] slurm/stage1.sh [CONFIG] [key=value …]"
script=$1
shift
[ -f "$script" ] || fail "there is no job script $script: see the folder slurm"
# The job reads the site file too, wherever it runs.
if [ -n "${MSER_SITE:-}" ]; then MSER_SITE=$(realpath -m -- "$MSER_SITE"); fi
export MSER_SITE="${MSER_SITE:-}" MSER_HOME
read_site

# asked KEY: what the job script itself asks for.
asked() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$script" | tail -n 1; }
own=$(asked gpus-per-node)
if [ -z "$gpus" ] && [ -n "$own" ]; then
  gpus=$own
  if [[ -n $SITE_NODE_GPUS && ${own##*:} -gt $SITE_NODE_GPUS ]]; then
    gpus=$SITE_NODE_GPUS
    [ -n "$tasks" ] || tasks=$SITE_NODE_GPUS # one task is one rank is one GPU
    options=("--ntasks-per-node=$tasks" "${options[@]}")
  fi
fi
# The script's own line goes: SLURM 26.05 refuses --gres=gpu beside it, and where no GPU is configured any line of that kind.
if [[ -n $gpus && $gpus != 0 ]]; then options=("${SITE_GPUS//%n/$gpus}" "${options[@]}"); fi
command=(sbatch "${SITE_SBATCH[@]}" "${options[@]}")
kept=$(sed '/^#SBATCH --gpus-per-node=/d' "$script")
if [ -n "$show" ]; then
  printf '%q ' "${command[@]}" "$script" "$@"
  printf '\n'
  exit
fi
command -v sbatch >/dev/null || fail "there is no sbatch here: submit from a login node (--show only shows what would be submitted)"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
printf '%s\n' "$kept" >"$copy/${script##*/}"
"${command[@]}" "$copy/${script##*/}" "$@"
