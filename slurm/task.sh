#!/bin/bash
# One task of a job step: task.sh COMMAND …, its exit code kept in the file $MSER_FIRST_CODE if it is the first to fail.
# srun itself returns the largest code of all tasks, so the 143 of a peer that it ended because of the first one would hide
# whether that one had a mistake to mend (2), had saved (75), or crashed.
set -euo pipefail
trap : TERM INT USR1 USR2 # SLURM signals this shell and the command: wait for the command to end by itself
code=0
"$@" || code=$?
((code == 0)) || (set -o noclobber && echo "$code" >"$MSER_FIRST_CODE") 2>/dev/null || true
exit "$code"
