#!/usr/bin/env bash
# Embeds a cohort with a SLURM array: each task takes every N-th slide of the sheet, and all write to one store.
#
#   sbatch --array=0-15 deploy/slurm/embed_array.sh cohort.csv /scratch/store --encoder uni2-h
#
# Arguments after the store go to `histosge embed`. Submit from the repository's root, or set HISTOSGE_DEPLOY to the folder
# `deploy`. Submit the same line again after a walltime, a failed node or a new slide: only missing blocks are computed.
# With an image: HISTOSGE_RUN="apptainer exec --nv --bind /scratch image.sif" sbatch ...
#SBATCH --job-name=histosge
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --gres=gpu:1
#SBATCH --output=histosge-%A_%a.log
set -euo pipefail

if test $# -lt 2; then
    echo "usage: sbatch --array=0-15 embed_array.sh SAMPLES STORE [options of histosge embed]" >&2
    exit 2
fi
samples=$1 store=$2
shift 2
deploy=${HISTOSGE_DEPLOY:-${SLURM_SUBMIT_DIR:-.}/deploy}
# Words of a command, such as `apptainer exec image.sif`; empty for the environment that is active.
read -r -a run <<< "${HISTOSGE_RUN:-}"

part=$(mktemp --suffix=.csv "${TMPDIR:-/tmp}/histosge-XXXXXX")
trap 'rm -f "$part"' EXIT
status=0
# Of --array=0-15, task 3 has number 3 - 0 of 16: an array may begin elsewhere, but not leave numbers out.
"${run[@]}" python3 "$deploy/sheet_part.py" "$samples" "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" \
    "$SLURM_ARRAY_TASK_COUNT" > "$part" || status=$?
if test "$status" -eq 3; then
    echo "fewer slides than tasks: nothing to do in this one"
    exit 0
fi
test "$status" -eq 0 || exit "$status"

# Exit code 1: done, but some slides failed. Their reasons are in the log and in `histosge ls`.
"${run[@]}" histosge embed "$part" "$store" "$@"
