#!/usr/bin/env bash
# Evaluates a run's checkpoints, one checkpoint per array task, or follows the run. From the repository's root:
#
#   sbatch slurm/eval.sh RUN                                             the newest checkpoint
#   sbatch --array=0-2 slurm/eval.sh RUN --step 1000 --step 2000 --step 3000
#   sbatch --array=0-9%2 slurm/eval.sh RUN all eval.sequences=1024       every checkpoint, two at a time
#   sbatch --array=1-3 slurm/eval.sh runs/seed-%a                        the newest checkpoint of one run per task: %a is
#                                                                        the task's number in the array (with --step N:
#                                                                        the same checkpoint of each run)
#   sbatch --time=1-00:00:00 slurm/eval.sh RUN --watch --depths 1,4,8    each checkpoint once, those to come too
#
# Options of `mythos eval` may follow. A job with --watch ends with the checkpoint of the run's last step; if its time is
# over before, submit it again: checkpoints that have a result are not evaluated again.
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
run=$1 index=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0})) run_of_task=''
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && $run == *%a* && ! -d $run ]]; then # a run's own name may have %a in it
  run=${run//%a/$SLURM_ARRAY_TASK_ID} index=0 run_of_task=yes
fi
shift
[ -d "$run/checkpoints" ] || { say "$run: no run with checkpoints there"; exit 2; }

# step_of NAME: print the step of a checkpoint; fails for another name, which must not be evaluated as an expression.
step_of() { [[ $1 =~ ^step_([0-9]{1,18})$ ]] && echo "$((10#${BASH_REMATCH[1]}))"; }

steps=() options=() watch='' all=''
while [ $# -gt 0 ]; do
  case $1 in
    --step)
      [[ ${2:-} =~ ^[0-9]{1,18}$ ]] || { say "--step ${2:-}: give the step of a checkpoint"; exit 2; }
      steps+=("$2")
      shift
      ;;
    all)
      all=yes
      for path in "$run"/checkpoints/step_*/state.json; do
        path=${path%/state.json}
        if step=$(step_of "${path##*/}"); then steps+=("$step"); fi
      done
      ;;
    --watch) watch=yes ;;
    --bos | --no-bos) options+=("$1") ;;
    --depths | --documents | --tasks | --task-data | --limit)
      [ $# -gt 1 ] || { say "$1: give a value"; exit 2; }
      options+=("$1" "$2")
      shift
      ;;
    *=*) options+=("$1") ;;
    *) say "$1: neither an option of \`mythos eval\` nor all nor key=value"; exit 2 ;;
  esac
  shift
done
if [[ -n $run_of_task && (-n $all || ${#steps[@]} -gt 1) ]]; then
  say "with %a each task evaluates one checkpoint of a run of its own: give at most one --step, or one array for each" \
    "run, without %a"
  exit 2
fi
if [ -n "$watch" ]; then
  if [ ${#steps[@]} -gt 0 ] || [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    say "--watch evaluates every checkpoint in one job: leave out --step, all and --array"
    exit 2
  fi
  chosen=(--watch)
elif [ ${#steps[@]} -eq 0 ]; then
  latest=$run/checkpoints/latest
  [ -f "$latest" ] || { say "$run: no complete checkpoint yet"; exit 2; }
  step=$(step_of "$(cat "$latest")") || { say "$latest: not the name of a checkpoint: give --step N or all"; exit 2; }
  steps=("$step")
fi
if [ -z "$watch" ] && [ "$index" -ge ${#steps[@]} ]; then
  say "nothing to do for index ${SLURM_ARRAY_TASK_ID:-0}: ${#steps[@]} checkpoints"
  exit 0
fi

[ -n "$watch" ] || chosen=(--step "${steps[$index]}")

exec srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" \
  --ntasks-per-node="$per_node" --cpus-per-task="$cpus" "${MYTHOS[@]}" eval "$run" "${chosen[@]}" \
  "${options[@]+"${options[@]}"}"
