#!/usr/bin/env bash
# Prepares data on several nodes, one process per core, with the arguments of `mythos data`. From the repository's root:
#   sbatch --nodes=4 slurm/data_prep.sh prepare /data/fineweb-edu/sample/10BT/*.parquet \
#       --tokenizer my/tokenizer.json --sequence-length 2048 --output /data/fineweb-edu-10bt
# `import` and `verify` run the same way. If it is stopped, submit it again with the same arguments: finished parts are
# kept. Sources and output must be on a file system that all nodes share.
#SBATCH --job-name=mythos-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mythos-data-%j.log

if [ $# -eq 0 ]; then
  echo "usage: sbatch [--nodes=N] slurm/data_prep.sh prepare|import|verify ..." >&2
  exit 2
fi
[ -f slurm/env.sh ] || { echo "data_prep.sh: no slurm/env.sh in $PWD: submit from the repository's root" >&2; exit 2; }
. slurm/env.sh || exit 2
. slurm/tasks.sh || exit 2
set -uo pipefail # not before: modules may use unset variables

# The secret by which the job's processes recognise each other: other users cannot read an environment.
export MYTHOS_JOB_TOKEN=${MYTHOS_JOB_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}

exec srun --kill-on-bad-exit=1 --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node" \
  --cpus-per-task="$cpus" "${MYTHOS[@]}" data "$@"
