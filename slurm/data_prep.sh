#!/usr/bin/env bash
# Text to shards on several nodes, one process a core. Give it what `mythos data` takes, from the repository's root:
#   sbatch --nodes=4 slurm/data_prep.sh prepare /data/fineweb-edu/sample/10BT/*.parquet \
#       --tokenizer my/tokenizer.json --sequence-length 2048 --output /data/fineweb-edu-10bt
# `import` and `verify` run the same way. Stopped or requeued, it goes on with the parts that were finished; submit it
# again with the same words. Sources and output must lie on a file system that all nodes share.
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
. slurm/tasks.sh
set -uo pipefail # not before: modules may lean on unset variables

exec srun --kill-on-bad-exit=1 --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node" \
  --cpus-per-task="$cpus" "${MYTHOS[@]}" data "$@"
