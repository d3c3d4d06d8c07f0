#!/usr/bin/env bash
# Submits an experiment: for each arm a job array that trains its seeds, for each run its evaluation when its training has
# ended, and the report after all. From the repository's root:
#
#   slurm/parity.sh EXPERIMENT.yaml [sbatch options]              for example --nodes=4 --gpus-per-node=8 --time=2-00:00:00
#   slurm/parity.sh EXPERIMENT.yaml --dry-run [sbatch options]    what would be submitted, and what it would cost
#
# Run it again at any time: what is finished is not done again, what is pending or running is left alone, and what has
# failed resumes. The sbatch options are those of the training jobs (slurm/pretrain.sh); EVAL_OPTIONS and REPORT_OPTIONS
# are words that sbatch gets for the evaluations (slurm/eval.sh) and for the report, PLAN_OPTIONS words that
# `mythos parity plan` gets for the price, such as "--cluster a100".
# The task's number in an array is the seed. Jobs are recognised by their names, which are NAME/ARM/train, NAME/ARM/eval
# and NAME/report with the experiment's NAME: give another name to a copy of an experiment.
say() { echo "parity.sh: $*" >&2; }

experiment='' dry_run='' options=()
for word in "$@"; do
  case $word in
    --dry-run) dry_run=yes ;;
    -*) options+=("$word") ;;
    *) if [ -z "$experiment" ]; then experiment=$word; else options+=("$word"); fi ;;
  esac
done
if [ -z "$experiment" ]; then
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
[ -f slurm/env.sh ] || { say "no slurm/env.sh in $PWD: run it from the repository's root"; exit 2; }
# shellcheck source=slurm/env.sh
. slurm/env.sh || exit 2
set -uo pipefail # not before: modules may use unset variables
read -ra eval_options <<<"${EVAL_OPTIONS:-}"
read -ra report_options <<<"${REPORT_OPTIONS:-}"
read -ra plan_options <<<"${PLAN_OPTIONS:-}"

begin=(--begin)
[ -z "$dry_run" ] || begin=()
missing=$("${MYTHOS[@]}" parity jobs "$experiment" "${begin[@]+"${begin[@]}"}") || exit 2

# The jobs in the queue, by name and task.
declare -A queued=() after=()
if ! queue=$(squeue --noheader --me --array --format='%F %K %j'); then
  say "squeue failed: is Slurm there?"
  [ -n "$dry_run" ] || exit 1
fi
while read -r number task name; do
  [[ ! $number =~ ^[0-9]+$ ]] || queued["$name $task"]=$number
done <<<"$queue"

# submit NAME TASKS WORDS...: submit a job; sets $number to its number.
submit() {
  local name=$1 tasks=$2 array=()
  shift 2
  submitted=yes number=''
  if [ -n "$dry_run" ]; then
    echo "$name${tasks:+, seeds $tasks}"
    return
  fi
  [ -z "$tasks" ] || array=("--array=$tasks")
  if ! number=$(sbatch --parsable --job-name="$name" "${array[@]+"${array[@]}"}" "$@"); then
    say "$name: sbatch failed, see above; seeds are the numbers of tasks, which must be below MaxArraySize" \
      "(scontrol show config). Run this again to submit what is missing"
    exit 1
  fi
  number=${number##*$'\n'} number=${number%%;*} # a site's wrapper may print notices; a federation adds the cluster's name
  [[ $number =~ ^[0-9]+$ ]] || { say "$name: sbatch printed no job number but $(printf %q "$number")"; exit 1; }
  say "$name${tasks:+, seeds $tasks}: job $number"
}

last='' report='' submitted='' waiting=0
while IFS=$'\t' read -r kind name seeds words; do
  IFS=, read -ra seeds <<<"${seeds:-}"
  IFS=$'\t' read -ra words <<<"${words:-}"
  case $kind in # a container or a site's wrapper may print notices
    training)
      new=''
      for seed in "${seeds[@]}"; do
        after["$seed"]=${queued["$name $seed"]:-}
        if [ -n "${after[$seed]}" ]; then waiting=$((waiting + 1)); else new+=,$seed; fi
      done
      if [ -n "$new" ]; then
        submit "$name" "${new#,}" "${options[@]+"${options[@]}"}" slurm/pretrain.sh "${words[@]}"
        for seed in ${new//,/ }; do after["$seed"]=${number:-new}; done
      fi
      ;;
    evaluation) # follows its arm's training, whose seeds may be in several jobs, or trained already
      declare -A of_job=()
      for seed in "${seeds[@]}"; do
        if [ -n "${queued["$name $seed"]:-}" ]; then
          waiting=$((waiting + 1)) last+=:${queued["$name $seed"]}
        else
          of_job["${after[$seed]:-none}"]+=,$seed
        fi
      done
      for job in "${!of_job[@]}"; do
        dependency=()
        [ "$job" = none ] || dependency=("--dependency=aftercorr:$job" --kill-on-invalid-dep=yes)
        submit "$name" "${of_job[$job]#,}" "${dependency[@]+"${dependency[@]}"}" \
          "${eval_options[@]+"${eval_options[@]}"}" slurm/eval.sh "${words[@]}"
        last+=:$number
      done
      after=()
      ;;
    report) report=$name ;;
  esac
done <<<"$missing"

[ "$waiting" -eq 0 ] || say "$waiting tasks are in the queue and are left alone"
if [ -z "$report" ]; then
  say "everything is finished: see \`mythos parity report $experiment\`"
elif [ -z "$submitted" ] && [ -n "${queued["$report N/A"]:-}" ]; then
  say "$report: job ${queued["$report N/A"]} is in the queue"
else # two reports at a time would write the same files
  condition=singleton
  [ -z "$last" ] || condition+=,afterany$last
  # shellcheck disable=SC2016  # for the job to expand
  submit "$report" '' --dependency="$condition" --nodes=1 --ntasks=1 --open-mode=append \
    "${report_options[@]+"${report_options[@]}"}" \
    --wrap "exec bash -c '. slurm/env.sh && exec \"\${MYTHOS[@]}\" parity report \"\$1\"' bash $(printf %q "$experiment")"
fi
[ -n "$dry_run" ] || exit 0

# The shape of the training jobs, as sbatch and slurm/tasks.sh find it: by the options, else by sbatch's variables, else by
# the header of slurm/pretrain.sh.
header() { sed -n "s/^#SBATCH --$1=//p" slurm/pretrain.sh; }
# gpus LIST: print how many GPUs 4, a100:4 or a100:2,h100:2 are; a type alone is one.
gpus() {
  local sum=0 part
  for part in ${1//,/ }; do
    part=${part##*:}
    if [[ $part =~ ^[0-9]{1,9}$ ]]; then sum=$((sum + 10#$part)); else sum=$((sum + 1)); fi
  done
  echo "$sum"
}
set -- "--nodes=$(header nodes)" "--gpus-per-node=${SBATCH_GPUS_PER_NODE:-$(header gpus-per-node)}" \
  ${SBATCH_GRES:+"--gres=$SBATCH_GRES"} ${SBATCH_GPUS:+"--gpus=$SBATCH_GPUS"} "${options[@]+"${options[@]}"}"
nodes='' gpus='' gres='' total='' tasks=''
while [ $# -gt 0 ]; do
  name=$1 value=''
  case $1 in
    --*=*) name=${1%%=*} value=${1#*=} ;;
    -[NG]?*) name=${1:0:2} value=${1:2} ;;
    -[NG] | --nodes | --gpus-per-node | --gres | --gpus | --ntasks-per-node)
      value=${2:-}
      [ $# -eq 1 ] || shift
      ;;
  esac
  case $name in
    -N | --nodes) nodes=$value ;;
    --gpus-per-node) gpus=$(gpus "$value") ;;
    --gres) gres=$(tr , '\n' <<<"$value" | sed -n 's/^gpu$/1/p; s/^gpu://p' | paste -sd ,) ;;
    -G | --gpus) total=$(gpus "$value") ;;
    --ntasks-per-node) tasks=$value ;;
  esac
  shift
done
if [ -n "$gres" ]; then
  gres=$(gpus "$gres")
  [ "$gres" -ge "$gpus" ] || gpus=$gres
fi
fewest=${nodes%%[-,:]*} per_node=${tasks:-$((gpus > 0 ? gpus : 1))}
if [[ ! $fewest =~ ^[1-9][0-9]{0,5}$ ]]; then
  say "no price: --nodes=$(printf %q "$nodes"): give the number of nodes"
  exit 2
fi
if [ "${total:-$((fewest * gpus))}" -ne $((fewest * gpus)) ]; then
  say "no price: --gpus=$total is not $fewest nodes x $gpus GPUs: give --nodes=N and --gpus-per-node=N instead"
  exit 2
fi
range=''
[ "$fewest" = "$nodes" ] || range=", the fewest of --nodes=$nodes"
echo "price of each run, nodes x processes: $fewest x $per_node$range:"
exec "${MYTHOS[@]}" parity plan "$experiment" --nodes "$fewest" "cluster.gpus_per_node=$per_node" \
  "${plan_options[@]+"${plan_options[@]}"}"
