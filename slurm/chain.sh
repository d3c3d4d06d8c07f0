#!/usr/bin/env bash
# Submits the same job several times, each to start when the one before has ended well: for runs longer than the time
# limit, where the cluster does not let jobs requeue themselves. A job that had to stop saves and ends well; a crash
# cancels the jobs after it. Whoever finds the run finished ends at once. From the repository's root:
#
#   slurm/chain.sh COUNT [sbatch options] slurm/pretrain.sh MODEL.yaml RUN.yaml key=value ...
#
# Prints the job numbers.
if [ $# -lt 2 ] || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
[ -f slurm/env.sh ] || { echo "chain.sh: no slurm/env.sh in $PWD: call it in the repository's root" >&2; exit 2; }
. slurm/env.sh || exit 2
set -euo pipefail # not before: modules may lean on unset variables
count=$1
shift

after=()
for i in $(seq "$count"); do
  # All but the last leave what remains to their successor.
  if [ "$i" -lt "$count" ]; then export MYTHOS_CHAINED=yes; else unset MYTHOS_CHAINED; fi
  job=$(sbatch --parsable "${after[@]+"${after[@]}"}" "$@")
  job=${job%%;*} # a federation adds the cluster's name
  after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  echo "$job"
done
