#!/usr/bin/env bash
# Trains, and resumes by itself after a preemption, a time limit or the loss of a node. From the repository's root:
#
#   sbatch slurm/pretrain.sh                                             the flagship
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml key=value ...
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml optim.learning_rate=1e-3 --accept optim.learning_rate
#   sbatch --nodes=2-4 --gpus-per-node=4 slurm/pretrain.sh ...           on 2 to 4 nodes, as many as are free
#   sbatch --cpus-per-gpu=16 slurm/pretrain.sh ...                       not --cpus-per-task: Slurm refuses it with GPUs
#   sbatch --gpus-per-node=0 --mincpus=32 --ntasks-per-node=4 ...        nodes without GPUs
#
# One process per GPU. With a range of nodes (and no --ntasks-per-node) the job restarts on the remaining nodes when one
# is lost. Its output is also in RUN/log/slurm-JOB.out.
# Exit codes are those of `mythos train`. After 85 (saved) or the loss of a node the job requeues itself, at most
# MAX_REQUEUES times and only while the run makes progress. A crash is not requeued.
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
trap 'ended=yes' TERM # scancel, or a requeue by someone else: the ranks get the signal, too, and save

say() { echo "pretrain.sh: $*" >&2; }

[ -f slurm/env.sh ] || { say "no slurm/env.sh in $PWD: submit from the repository's root"; exit "$BAD_INPUT"; }
. slurm/env.sh || exit "$BAD_INPUT"
. slurm/tasks.sh
set -uo pipefail # not before: modules may use unset variables
[ $# -gt 0 ] || set -- configs/model/looped-moe-770m.yaml configs/run/pretrain.yaml

# An invalid configuration ends the job here. A range of nodes may give more than the batch can be divided over.
answer=$("${MYTHOS[@]}" job --nodes "$SLURM_JOB_NUM_NODES" --tasks-per-node "$per_node" "$@") || exit
nodes=${answer%% *} run=${answer#* }
if [ "$nodes" -lt "$SLURM_JOB_NUM_NODES" ]; then
  say "uses $nodes of $SLURM_JOB_NUM_NODES nodes: the global batch cannot be divided over more"
fi

# Slurm opens the output file before the run directory is known: link it into the run directory.
log=$run/log/slurm-$SLURM_JOB_ID.out output=$(readlink "/proc/$$/fd/1")
case $([ -e "$run/config.yaml" ] || ls -A "$run" 2>/dev/null) in
  '' | log) # a run, or an empty place for one; nothing is written into any other directory
    mkdir -p "$run/log" || exit "$BAD_INPUT"
    if [ -f "$output" ] && [ ! -e "$log" ]; then ln "$output" "$log" 2>/dev/null || ln -s "$output" "$log"; fi
    ;;
esac
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes nodes x $per_node tasks, run directory $run"

newest_checkpoint() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }
starts() { grep -cs '"event": "started"' "$run/events.jsonl"; }

# The first signals may arrive before the ranks have installed their handlers, so they are repeated until the run's
# journal records its start. Then one more is enough, and the ranks' children, such as compilers, receive no others.
forward() {
  asked=yes
  trap '' USR1
  while
    begun=$(starts)
    kill -USR1 "$step" 2>/dev/null && [ "${begun:-0}" -le "${starts_before:-0}" ]
  do sleep 2; done &
  forwarder=$!
}

# Whether srun has printed this message since the step began: its exit code does not show what happened to the step.
srun_printed() {
  [ -f "/proc/$$/fd/2" ] && tail -c "+$((printed_before + 1))" "/proc/$$/fd/2" | grep -F "srun: $1" >/dev/null
}

# Whether Slurm reports a node of the job as down, or cannot start a task on one. Other errors of srun do not count.
node_is_lost() {
  local said code missed='State=[^ ]*(DOWN|NOT_RESPONDING|\*)'
  if scontrol show node "$SLURM_JOB_NODELIST" -o | grep -E "$missed" >/dev/null; then return; fi
  said=$(SLURM_OVERLAP=1 timeout -k 5 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --cpus-per-task=1 true 2>&1)
  code=$?
  [ "$code" -eq 124 ] || [[ $said == *"Task launch for "*" failed on node "* ]]
}

# Slurm takes some minutes to mark a node as down, and then requeues the job by itself, which ends this script.
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
    say "$1; the next job of the chain resumes from checkpoint $newest"
    exit 0
  elif [ -f "$requeues" ] && [ "$(tail -n 1 "$requeues")" = "$newest" ]; then
    say "$1; not requeued: no progress since the last time (checkpoint $newest)"
  elif [ -f "$requeues" ] && [ "$(wc -l <"$requeues")" -ge "$MAX_REQUEUES" ] || [ "$MAX_REQUEUES" -eq 0 ]; then
    say "$1; not requeued: MAX_REQUEUES ($MAX_REQUEUES) reached; submit the job again to resume"
  else
    echo "$newest" >>"$requeues"
    say "$1; requeued, to resume from checkpoint $newest"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
}

# USR1 is ignored, by srun and by each task, until it is handled: its default would kill them.
[ -z "$ended" ] || exit 143
early=$asked
trap '' USR1
starts_before=$(starts) printed_before=$(stat -L -c %s "/proc/$$/fd/2")
# The nodes by name, because the ranks meet on the first one. --wait ends a rank that is still running so long after the
# others have ended: its node may have lost it.
# shellcheck disable=SC2016  # for the tasks' shells to expand
srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --nodes="$nodes" --ntasks="$((nodes * per_node))" \
  --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
  --nodelist="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd ,)" \
  bash -c 'trap "" USR1; exec "$@"' bash "${MYTHOS[@]}" train "$@" &
step=$! forwarder=''
trap forward USR1
[ -z "$early" ] || forward

while
  wait "$step" # a trap interrupts it
  code=$?
  kill -0 "$step" 2>/dev/null
do :; done
wait "$step" 2>/dev/null # in case a trap interrupted it just when srun ended; 127: it did not
late=$?
[ "$late" -eq 127 ] || code=$late
trap '' USR1
[ -z "$forwarder" ] || kill "$forwarder" 2>/dev/null

if [ -n "$ended" ] || [ "$code" -eq 0 ] || [ "$code" -eq "$BAD_INPUT" ]; then
  : # nothing to resume, or Slurm requeues the job
elif [ "$code" -eq "$PREEMPTED" ]; then
  requeue "saved"
elif srun_printed 'Cancelled pending job step'; then
  requeue "asked to stop before the ranks had started"
elif node_is_lost; then
  say "exit code $code, and a node does not respond: waiting for Slurm to requeue the job"
  wait_for_slurm
  [ -n "$ended" ] || requeue "exit code $code after the loss of a node"
elif srun_printed 'error: Timed out waiting for job step to complete'; then
  requeue "exit code $code, and a node has lost its ranks without reporting it"
fi
say "ends with exit code $code"
exit "$code"
