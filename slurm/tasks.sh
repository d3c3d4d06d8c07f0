# shellcheck shell=bash
# What the batch scripts share, sourced after env.sh: the number of processes per node, and where they meet.
#
# One process per GPU, unless --ntasks-per-node is given (on CPU nodes: give it, with --gpus-per-node=0). The scripts do
# not request tasks themselves: Slurm 22.05 keeps the number of tasks of the first start, so that with --ntasks-per-node
# a job with a range of nodes would wait for ever for a lost node.

# first_nodes COUNT: print the names of the job's first nodes, one a line. A site's wrapper may print notices before them.
first_nodes() {
  local names
  names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n "$SLURM_JOB_NUM_NODES")
  if [ "$(grep -cxE '[[:alnum:]][[:alnum:]._-]*' <<<"$names")" -ne "$SLURM_JOB_NUM_NODES" ]; then
    echo "slurm/tasks.sh: scontrol show hostnames $SLURM_JOB_NODELIST: the last $SLURM_JOB_NUM_NODES lines of its output" \
      "are not the names of $SLURM_JOB_NUM_NODES nodes, but $(quoted "$names"): see what scontrol runs on this cluster" >&2
    return 1
  fi
  head -n "$1" <<<"$names"
}

# quoted TEXT: print the beginning of any text on one line, without control characters.
quoted() { printf '%q' "${1:0:200}"; }

for name in MAX_REQUEUES NODE_LOSS_WAIT_S SLURM_WAIT; do
  if [[ ! ${!name:-0} =~ ^(0|[1-9][0-9]{0,5})$ ]]; then
    echo "slurm/tasks.sh: $name=$(quoted "${!name}"): give a whole number up to 999999" >&2
    return 1
  fi
done

# The GPUs that were requested: --exclusive gives all of a node, --gres fewer than the header's --gpus-per-node.
gpus=${SLURM_GPUS_ON_NODE:-}
if [[ ${SLURM_GPUS_PER_NODE:-} =~ ^([^,]*:)?([0-9]+)$ ]]; then # 3 or a100:3
  [ "${gpus:-${BASH_REMATCH[2]}}" -lt "${BASH_REMATCH[2]}" ] || gpus=${BASH_REMATCH[2]}
fi
per_node=${SLURM_NTASKS_PER_NODE:-$((${gpus:-0} > 0 ? gpus : 1))}

# CPUs per process, the same on all nodes: of 64(x2),48 the smallest number.
cpus=$SLURM_CPUS_ON_NODE
for part in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
  [ "${part%%(*}" -ge "$cpus" ] || cpus=${part%%(*}
done
# shellcheck disable=SC2034  # for the script that sources this
cpus=$((cpus > per_node ? cpus / per_node : 1))

# srun inherits these from the job, where they contradict its own options or each other. Without them a step gets all of
# the job's GPUs, and its processes choose theirs by their local rank.
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK \
  SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET
# Otherwise sbatch --export=NONE would apply to srun, too, and the processes would have no environment.
export SLURM_EXPORT_ENV=ALL

# All ranks meet on the first node. They could ask Slurm themselves, but not in a container without Slurm. They compute
# the port from the numbers of the job, the start and the step, so that no two steps use the same one.
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=$(first_nodes 1) || return
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then # the address that Slurm itself uses; torch would retry the name
    address=$(scontrol show node "$MASTER_ADDR" -o | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
    if [[ ! $address =~ ^[[:alnum:]._:-]+$ ]]; then
      echo "slurm/tasks.sh: the name $MASTER_ADDR of the first node does not resolve, and Slurm knows no NodeAddr:" \
        "set MASTER_ADDR" >&2
      return 1
    fi
    MASTER_ADDR=$address
  fi
  export MASTER_ADDR
fi
