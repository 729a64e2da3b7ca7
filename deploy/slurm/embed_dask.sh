#!/usr/bin/env bash
# Embeds a cohort with a dask cluster inside one SLURM job: a scheduler, and a worker for each task of the job.
#
#   sbatch --ntasks=16 deploy/slurm/embed_dask.sh cohort.csv /scratch/store --encoder uni2-h
#
# Better than an array where slides differ much in size, since blocks of one slide go to all workers; an array starts
# sooner, since its tasks need not wait for each other. Arguments after the store go to `histosge embed`.
#SBATCH --job-name=histosge-dask
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=8G
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --output=histosge-%j.log
set -euo pipefail

if test $# -lt 2; then
    echo "usage: sbatch --ntasks=16 embed_dask.sh SAMPLES STORE [options of histosge embed]" >&2
    exit 2
fi
samples=$1 store=$2
shift 2
read -r -a run <<< "${HISTOSGE_RUN:-}"

# On a disk that all nodes see: workers find the scheduler by this file.
folder=$(mktemp --directory "${SLURM_SUBMIT_DIR:-$PWD}/histosge-dask-XXXXXX")
file=$folder/scheduler.json
jobs=()
stop() {
    # Workers before their scheduler, which they would look for until their own time is up.
    for ((i = ${#jobs[@]} - 1; i >= 0; i--)); do
        kill "${jobs[i]}" 2> /dev/null && wait "${jobs[i]}" || true
    done
    rm -rf "$folder"
}
trap stop EXIT

# Port 0: a free one, since several jobs may share a node.
"${run[@]}" python3 -m distributed.cli.dask_scheduler --port 0 --no-dashboard --scheduler-file "$file" &
jobs+=($!)
srun "${run[@]}" python3 -m distributed.cli.dask_worker --scheduler-file "$file" --no-dashboard \
    --nthreads "${SLURM_CPUS_PER_TASK:-4}" --nworkers 1 --local-directory "${TMPDIR:-/tmp}" &
jobs+=($!)
for ((second = 0; second < 120; second++)); do
    test -s "$file" && break
    sleep 1
done
test -s "$file" || { echo "the scheduler did not start within 120 s" >&2; exit 1; }
address=$(sed -n 's/.*"address": "\([^"]*\)".*/\1/p' "$file")

"${run[@]}" histosge embed "$samples" "$store" --scheduler "$address" "$@"
