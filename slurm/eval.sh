#!/usr/bin/env bash
# Measures the validation losses of a run's checkpoints, one checkpoint per array task. From the repository's root:
#
#   sbatch slurm/eval.sh RUN                                             the newest checkpoint
#   sbatch --array=0-2 slurm/eval.sh RUN --step 1000 --step 2000 --step 3000
#   sbatch --array=0-9%2 slurm/eval.sh RUN all eval.sequences=1024       every checkpoint, two at a time
#
# The array's first task takes the first checkpoint; tasks beyond the last checkpoint do nothing. The results are in
# RUN/evaluations/.
#SBATCH --job-name=mythos-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

say() { echo "eval.sh: $*" >&2; }

[ -f slurm/env.sh ] || { say "no slurm/env.sh in $PWD: submit from the repository's root"; exit 2; }
. slurm/env.sh || exit 2
. slurm/tasks.sh || exit 2
set -uo pipefail # not before: modules may use unset variables
[ $# -gt 0 ] || { say "give a run directory"; exit 2; }
run=$1
shift
[ -d "$run/checkpoints" ] || { say "$run: no run with checkpoints there"; exit 2; }

# step_of NAME: print the step of a checkpoint; fails for another name, which must not be evaluated as an expression.
step_of() { [[ $1 =~ ^step_([0-9]{1,18})$ ]] && echo "$((10#${BASH_REMATCH[1]}))"; }

steps=() overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --step)
      [[ ${2:-} =~ ^[0-9]{1,18}$ ]] || { say "--step ${2:-}: give the step of a checkpoint"; exit 2; }
      steps+=("$2")
      shift
      ;;
    all)
      for path in "$run"/checkpoints/step_*/state.json; do
        path=${path%/state.json}
        if step=$(step_of "${path##*/}"); then steps+=("$step"); fi
      done
      ;;
    *=*) overrides+=("$1") ;;
    *) say "$1: neither --step N nor all nor key=value"; exit 2 ;;
  esac
  shift
done
if [ ${#steps[@]} -eq 0 ]; then
  latest=$run/checkpoints/latest
  [ -f "$latest" ] || { say "$run: no complete checkpoint yet"; exit 2; }
  step=$(step_of "$(cat "$latest")") || { say "$latest: not the name of a checkpoint: give --step N or all"; exit 2; }
  steps=("$step")
fi
index=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
if [ "$index" -ge ${#steps[@]} ]; then
  say "nothing to do for index ${SLURM_ARRAY_TASK_ID:-0}: ${#steps[@]} checkpoints"
  exit 0
fi

exec srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" \
  --ntasks-per-node="$per_node" --cpus-per-task="$cpus" "${MYTHOS[@]}" eval "$run" --step "${steps[$index]}" \
  "${overrides[@]+"${overrides[@]}"}"
