#!/usr/bin/env bash
# Trains, and goes on by itself after a preemption, a time limit or the loss of a node. From the repository's root:
#
#   sbatch slurm/pretrain.sh                                             the flagship
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml key=value ...
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml optim.learning_rate=1e-3 --accept optim.learning_rate
#   sbatch --nodes=2-4 --gpus-per-node=4 slurm/pretrain.sh ...           on 2 to 4 nodes, as many as there are
#   sbatch --cpus-per-gpu=16 slurm/pretrain.sh ...                       not --cpus-per-task: Slurm refuses it with GPUs
#   sbatch --gpus-per-node=0 --mincpus=32 --ntasks-per-node=4 ...        nodes without GPUs
#
# One process a GPU. With a range of nodes (and no --ntasks-per-node) the job comes back on those that remain when one
# is lost. Its output is also RUN/log/slurm-JOB.out.
# Exit codes are those of `mythos train`. After 85 (saved) or the loss of a node the job requeues itself, at most
# MAX_REQUEUES times and only while the run gains steps. A crash is not requeued.
#SBATCH --job-name=mythos
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

BAD_INPUT=2 PREEMPTED=85

asked='' ended=''
trap 'asked=yes' USR1
trap 'ended=yes' TERM # scancel, or a requeue by others: the ranks have it too, and save

say() { echo "pretrain.sh: $*" >&2; }

[ -f slurm/env.sh ] || { say "no slurm/env.sh in $PWD: submit from the repository's root"; exit "$BAD_INPUT"; }
. slurm/env.sh || exit "$BAD_INPUT"
. slurm/tasks.sh
set -uo pipefail # not before: modules may lean on unset variables
[ $# -gt 0 ] || set -- configs/model/looped-moe-770m.yaml configs/run/pretrain.yaml

# A wrong configuration ends the job here. With a node range there may be more nodes than the batch divides over.
answer=$("${MYTHOS[@]}" job --nodes "$SLURM_JOB_NUM_NODES" --tasks-per-node "$per_node" "$@") || exit
nodes=${answer%% *} run=${answer#* }
if [ "$nodes" -lt "$SLURM_JOB_NUM_NODES" ]; then
  say "uses $nodes of $SLURM_JOB_NUM_NODES nodes: the global batch does not divide over more"
fi

# Slurm opens the output before anyone knows the run directory: a second name there for the same file.
log=$run/log/slurm-$SLURM_JOB_ID.out output=$(readlink "/proc/$$/fd/1")
case $([ -e "$run/config.yaml" ] || ls -A "$run" 2>/dev/null) in
  '' | log) # a run, or room for one; anything else is not ours to write into
    mkdir -p "$run/log" || exit "$BAD_INPUT"
    if [ -f "$output" ] && [ ! -e "$log" ]; then ln "$output" "$log" 2>/dev/null || ln -s "$output" "$log"; fi
    ;;
esac
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes nodes x $per_node tasks, run directory $run"

newest_checkpoint() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }
lives() { grep -cs '"event": "started"' "$run/events.jsonl"; }

# The first signals may come before the ranks can hear them, so they are repeated. When the run writes down that it has
# started, all ranks can: one more is enough then, and their children, such as compilers, are not hit again and again.
forward() {
  asked=yes
  trap '' USR1
  while
    begun=$(lives)
    kill -USR1 "$step" 2>/dev/null && [ "${begun:-0}" -le "${lives_before:-0}" ]
  do sleep 2; done &
  forwarder=$!
}

# Whether srun has said so since the step began: what became of the step, its exit code does not tell.
srun_said() {
  [ -f "/proc/$$/fd/2" ] && tail -c "+$((said_before + 1))" "/proc/$$/fd/2" | grep -F "srun: $1" >/dev/null
}

# Whether Slurm misses a node of the job, or one starts no task. That srun fails in another way proves nothing.
node_is_lost() {
  local said code missed='State=[^ ]*(DOWN|NOT_RESPONDING|\*)'
  if scontrol show node "$SLURM_JOB_NODELIST" -o | grep -E "$missed" >/dev/null; then return; fi
  said=$(SLURM_OVERLAP=1 timeout -k 5 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --cpus-per-task=1 true 2>&1)
  code=$?
  [ "$code" -eq 124 ] || [[ $said == *"Task launch for "*" failed on node "* ]]
}

# Slurm takes some minutes to find a node down, and then requeues the job by itself, which ends this script.
wait_for_slurm() {
  local until=$((SECONDS + ${NODE_LOSS_WAIT_S:-900}))
  while [ "$SECONDS" -lt "$until" ] && [ -z "$ended" ] && node_is_lost; do
    sleep 5 &
    wait $!
  done
}

requeue() { # requeue WHY
  local requeues=$run/log/requeues-$SLURM_JOB_ID newest
  newest=$(newest_checkpoint)
  if [ -n "${MYTHOS_CHAINED:-}" ]; then
    say "$1; the next job of the chain goes on from checkpoint $newest"
    exit 0
  elif [ -f "$requeues" ] && [ "$(tail -n 1 "$requeues")" = "$newest" ]; then
    say "$1; not requeued: no step was gained since the last time (checkpoint $newest)"
  elif [ -f "$requeues" ] && [ "$(wc -l <"$requeues")" -ge "$MAX_REQUEUES" ] || [ "$MAX_REQUEUES" -eq 0 ]; then
    say "$1; not requeued: MAX_REQUEUES ($MAX_REQUEUES) reached; submit the job again to go on"
  else
    echo "$newest" >>"$requeues"
    say "$1; requeued, to go on from checkpoint $newest"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
}

# USR1 is ignored, by srun and by each task, until it is handled: its default would kill them.
[ -z "$ended" ] || exit 143
early=$asked
trap '' USR1
lives_before=$(lives) said_before=$(stat -L -c %s "/proc/$$/fd/2")
# The nodes by name, for the ranks meet on the first one. A rank of which nothing is heard any more, though the others
# have ended, is given up: its node has lost it.
# shellcheck disable=SC2016  # for the tasks' shells to expand
srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --nodes="$nodes" --ntasks="$((nodes * per_node))" \
  --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
  --nodelist="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd ,)" \
  bash -c 'trap "" USR1; exec "$@"' bash "${MYTHOS[@]}" train "$@" &
step=$! forwarder=''
trap forward USR1
[ -z "$early" ] || forward

while
  wait "$step" # which a trap interrupts
  code=$?
  kill -0 "$step" 2>/dev/null
do :; done
wait "$step" 2>/dev/null # a trap may have interrupted it just when srun ended; 127: it had not
late=$?
[ "$late" -eq 127 ] || code=$late
trap '' USR1
[ -z "$forwarder" ] || kill "$forwarder" 2>/dev/null

if [ -n "$ended" ] || [ "$code" -eq 0 ] || [ "$code" -eq "$BAD_INPUT" ]; then
  : # nothing to go on with, or Slurm sees to it
elif [ "$code" -eq "$PREEMPTED" ]; then
  requeue "saved"
elif srun_said 'Cancelled pending job step'; then
  requeue "asked to stop before the ranks had started"
elif node_is_lost; then
  say "exit code $code, and a node does not answer: waiting for Slurm to requeue the job"
  wait_for_slurm
  [ -n "$ended" ] || requeue "exit code $code after the loss of a node"
elif srun_said 'error: Timed out waiting for job step to complete'; then
  requeue "exit code $code, and a node has lost its ranks without a word"
fi
say "ends with exit code $code"
exit "$code"
