#!/usr/bin/env bash
# Submits the same job several times, each to start when the one before has succeeded: for runs longer than the time
# limit, on clusters where jobs may not requeue themselves. A job that has to stop saves and succeeds; a crash cancels
# the jobs after it. A job that finds the run finished ends at once. Each task of a job array continues the same task of
# the array before. From the repository's root:
#
#   slurm/chain.sh COUNT [sbatch options] slurm/pretrain.sh MODEL.yaml RUN.yaml key=value ...
#
# Prints the job numbers.
if [ $# -lt 2 ] || [[ ! $1 =~ ^[1-9][0-9]{0,2}$ ]]; then
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
[ -f slurm/env.sh ] || { echo "chain.sh: no slurm/env.sh in $PWD: run it from the repository's root" >&2; exit 2; }
. slurm/env.sh || exit 2
set -euo pipefail # not before: modules may use unset variables
count=$1
shift

after=()
for i in $(seq "$count"); do
  # All but the last leave the remaining steps to the next job.
  if [ "$i" -lt "$count" ]; then export MYTHOS_CHAINED=yes; else unset MYTHOS_CHAINED; fi
  job=$(sbatch --parsable "${after[@]+"${after[@]}"}" "$@")
  job=${job##*$'\n'} # a site's wrapper may print notices first
  job=${job%%;*} # a federation adds the cluster's name
  if [[ ! $job =~ ^[0-9]+$ ]]; then
    echo "chain.sh: sbatch --parsable: the last line of its output is not the number of a job, but $(printf %q "$job"):" \
      "cancel this job if squeue shows it; the ones printed above were submitted" >&2
    exit 1
  fi
  after=("--dependency=aftercorr:$job" --kill-on-invalid-dep=yes)
  echo "$job"
done
