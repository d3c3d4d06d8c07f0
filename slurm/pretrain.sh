#!/usr/bin/env bash
# Trains, and resumes by itself after a preemption, a time limit or the loss of a node. From the repository's root:
#
#   sbatch slurm/pretrain.sh                                             the flagship
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml key=value ...
#   sbatch slurm/pretrain.sh MODEL.yaml RUN.yaml optim.learning_rate=1e-3 --accept optim.learning_rate
#   sbatch --nodes=2-4 --gpus-per-node=4 slurm/pretrain.sh ...           on 2 to 4 nodes, as many as are free
#   sbatch --cpus-per-gpu=16 slurm/pretrain.sh ...                       not --cpus-per-task: Slurm refuses it with GPUs
#   sbatch --gpus-per-node=0 --mincpus=32 --ntasks-per-node=4 ...        nodes without GPUs
#   sbatch --array=1-3 slurm/pretrain.sh MODEL.yaml RUN.yaml 'seed=${oc.env:SLURM_ARRAY_TASK_ID}' \
#       'run.directory=runs/seed-${oc.env:SLURM_ARRAY_TASK_ID}'          one run per task of a job array
#
# One process per GPU. With a range of nodes (and no --ntasks-per-node) the job restarts on the remaining nodes when one
# is lost. Its output is also in RUN/log/slurm-JOB.out.
# Exit codes are those of `mythos train`. After 85 (saved) or the loss of a node the job requeues itself, at most
# MAX_REQUEUES times and only while the run makes progress, or if it was asked to stop before the run had begun. A crash
# is not requeued.
#SBATCH --job-name=mythos
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:URG@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# First of all: USR1 or USR2 would end a script that does not handle them yet. URG would not, so Slurm is asked for that.
asked='' ended=''
trap 'asked=yes' URG USR1 USR2
trap 'ended=yes' TERM # scancel, or a requeue by someone else: the ranks get the signal, too, and save

BAD_INPUT=2 PREEMPTED=85 KILLED_BY_USR1=$((128 + $(kill -l USR1)))

say() { echo "pretrain.sh: $*" >&2; }

[ -f slurm/env.sh ] || { say "no slurm/env.sh in $PWD: submit from the repository's root"; exit "$BAD_INPUT"; }
. slurm/env.sh || exit "$BAD_INPUT"
. slurm/tasks.sh || exit "$BAD_INPUT"
set -uo pipefail # not before: modules may use unset variables
[ $# -gt 0 ] || set -- configs/model/looped-moe-770m.yaml configs/run/pretrain.yaml

# The job as Slurm's commands name it. The last task of an array has the array's number as SLURM_JOB_ID: with that, all
# tasks would be requeued.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Ask Slurm to requeue the job, and exit. The controller may be busy or restarting, so it is asked up to five times.
requeue_and_exit() {
  local attempt
  for attempt in 1 2 3 4 5; do
    [ "$attempt" -eq 1 ] || sleep 2
    scontrol requeue "$job" && exit 0
  done
  say "scontrol requeue failed: submit the job again to resume"
}

# end CODE: end the script. Slurm repeats the kill of a job on a lost node until it arrives. If the node is back by then and
# the job has been started on it again, this start is killed, which Slurm takes for the job's end.
end() {
  trap '' TERM # the kill may come twice, and must not reach scontrol
  if [ -n "$ended" ] && [ "$SECONDS" -lt 60 ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] &&
    [ "$SLURM_RESTART_COUNT" -le "$MAX_REQUEUES" ] &&
    [[ $(scontrol show job "$job" -o) == *" JobState=RUNNING "* ]]; then # scancel would have changed the state
    say "killed with the job's former start on a lost node; requeued"
    requeue_and_exit
  fi
  exit "$1"
}

# An invalid configuration ends the job here. A range of nodes may give more than the batch can be divided over.
# `scancel --full` signals the script's children, too.
while answer=$("${MYTHOS[@]}" job --nodes "$SLURM_JOB_NUM_NODES" --tasks-per-node "$per_node" "$@"); code=$?
  [ "$code" -eq "$KILLED_BY_USR1" ]
do :; done
[ "$code" -eq 0 ] || end "$code"
answer=${answer##*$'\n'} # a container or a site's wrapper may print notices first
if [[ ! $answer =~ ^([1-9][0-9]{0,5})\ ([^[:cntrl:]]+)$ ]] || [ "${BASH_REMATCH[1]}" -gt "$SLURM_JOB_NUM_NODES" ]; then
  say "${MYTHOS[*]} job: the last line of its output is not the number of nodes and the run directory, but" \
    "$(quoted "$answer"): see MYTHOS in slurm/env.sh"
  exit "$BAD_INPUT"
fi
nodes=${BASH_REMATCH[1]} run=${BASH_REMATCH[2]}
names=$(first_nodes "$nodes") || exit "$BAD_INPUT"
if [ "$nodes" -lt "$SLURM_JOB_NUM_NODES" ]; then
  say "uses $nodes of $SLURM_JOB_NUM_NODES nodes: the global batch cannot be divided over more"
fi

# Slurm opens the output file before the run directory is known: link it into the run directory.
log=$run/log/slurm-$job.out output=$(readlink "/proc/$$/fd/1")
case $([ -e "$run/config.yaml" ] || ls -A "$run" 2>/dev/null) in
  '' | log | events.jsonl$'\n'log) # a run, or an empty place for one; nothing is written into any other directory
    mkdir -p "$run/log" || exit "$BAD_INPUT"
    if [ -f "$output" ] && [ ! -e "$log" ]; then ln "$output" "$log" 2>/dev/null || ln -s "$output" "$log"; fi
    ;;
esac
say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes nodes x $per_node tasks, run directory $run"

newest_checkpoint() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }
# The number of such events in the run's journal.
count() {
  local lines
  lines=$(grep -cs "\"event\": \"$1\"" "$run/events.jsonl")
  echo "${lines:-0}"
}
has_begun() { [ "$(count started)" -gt "$starts_before" ]; }

# A signal may arrive before there are ranks, so it is repeated until the run's journal records its start. Before that it
# ends the ranks, whether they handle it yet or not, and the job is requeued. After that one more is enough, and the ranks'
# children, such as compilers, receive no others.
forward() {
  asked=yes
  [ -z "$forwarder" ] || return
  trap '' URG USR1 USR2
  while
    has_begun
    begun=$?
    kill -USR1 "$step" 2>/dev/null && [ "$begun" -ne 0 ]
  do sleep 2; done &
  forwarder=$!
}

# What srun has printed about the step: its exit code, the largest of all tasks, does not show what happened.
srun_messages() { [ ! -f "/proc/$$/fd/2" ] || tail -c "+$((printed_before + 1))" "/proc/$$/fd/2" | grep '^srun: '; }

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

requeue() { # requeue WHY; before the run has begun, no progress is expected
  local requeues=$run/log/requeues-$job newest
  newest=$(newest_checkpoint)
  if [ -n "${MYTHOS_CHAINED:-}" ]; then
    say "$1; the next job of the chain resumes from checkpoint $newest"
    exit 0
  elif has_begun && [ -f "$requeues" ] && [ "$(tail -n 1 "$requeues")" = "$newest" ]; then
    say "$1; not requeued: no progress since the last time (checkpoint $newest)"
  elif [ -f "$requeues" ] && [ "$(wc -l <"$requeues")" -ge "$MAX_REQUEUES" ] || [ "$MAX_REQUEUES" -eq 0 ]; then
    say "$1; not requeued: MAX_REQUEUES ($MAX_REQUEUES) reached; submit the job again to resume"
  else
    if has_begun; then echo "$newest"; else echo "not begun"; fi >>"$requeues"
    say "$1; requeued, to resume from checkpoint $newest"
    requeue_and_exit
  fi
}

# The cause of a failure is recorded in the run's journal, for `mythos status`: here if no rank could do so.
record_failure() {
  if [ -d "$run/log" ] && ! has_begun && [ "$(count failed)" -le "$failures_before" ]; then
    printf '{"event": "failed", "time": "%s", "host": "%s", "exit_code": %d, "message": "%s"}\n' "$(date +%FT%T%z)" \
      "$HOSTNAME" "$code" "job $job ended before the run had begun: see log/slurm-$job.out" >>"$run/events.jsonl"
  fi
}

[ -z "$ended" ] || end 143
starts_before=$(count started) failures_before=$(count failed) printed_before=$(stat -L -c %s "/proc/$$/fd/2")
# The nodes by name, because the ranks meet on the first one. --wait ends a rank that is still running so long after the
# others have ended: its node may have lost it.
(
  trap '' URG USR1 USR2 # srun ignores them until it handles them
  exec srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" --nodes="$nodes" --ntasks="$((nodes * per_node))" \
    --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
    --nodelist="$(paste -sd , <<<"$names")" \
    "${MYTHOS[@]}" train "$@"
) &
step=$! forwarder=''
trap forward URG USR1 USR2
[ -z "$asked" ] || forward

while
  wait "$step" # a trap interrupts it
  code=$?
  kill -0 "$step" 2>/dev/null
do :; done
wait "$step" 2>/dev/null # in case a trap interrupted it just when srun ended; 127: it did not
late=$?
[ "$late" -eq 127 ] || code=$late
trap '' URG USR1 USR2
[ -z "$forwarder" ] || kill "$forwarder" 2>/dev/null

said=$(srun_messages)
# In a start that failed, the first code is the cause: the other ranks were ended because of it.
if ! has_begun && [[ $said =~ Exited\ with\ exit\ code\ ([0-9]+) ]]; then code=${BASH_REMATCH[1]}; fi

if [ -n "$ended" ] || [ "$code" -eq 0 ] || [ "$code" -eq "$BAD_INPUT" ]; then
  : # nothing to resume, or Slurm requeues the job
elif ! has_begun && [[ $asked || $code -eq PREEMPTED || $said == *": User defined signal "* ]]; then
  requeue "asked to stop before the run had begun"
elif [ "$code" -eq "$PREEMPTED" ]; then
  requeue "saved"
elif node_is_lost; then
  say "exit code $code, and a node does not respond: waiting for Slurm to requeue the job"
  wait_for_slurm
  [ -n "$ended" ] || requeue "exit code $code after the loss of a node"
elif [[ $said == *'error: Timed out waiting for job step to complete'* ]]; then
  requeue "exit code $code, and a node has lost its ranks without reporting it"
fi
[ -n "$ended" ] || [ "$code" -eq 0 ] || record_failure
say "ends with exit code $code"
end "$code"
