# shellcheck shell=bash
# What the batch scripts share, sourced after env.sh: how a job's processes lie on its nodes, and where they meet.
#
# One process a GPU, unless --ntasks-per-node says otherwise (on CPU nodes: give it, with --gpus-per-node=0). Jobs do
# not ask for tasks themselves: Slurm 22.05 keeps the number of tasks of the first start, so that with --ntasks-per-node
# a job with a range of nodes waits for the lost node for ever.

# Of the GPUs on a node those that were asked for: --exclusive gives all, --gres fewer than the header's --gpus-per-node.
gpus=${SLURM_GPUS_ON_NODE:-}
if [[ ${SLURM_GPUS_PER_NODE:-} =~ ^([^,]*:)?([0-9]+)$ ]]; then # 3 or a100:3
  [ "${gpus:-${BASH_REMATCH[2]}}" -lt "${BASH_REMATCH[2]}" ] || gpus=${BASH_REMATCH[2]}
fi
per_node=${SLURM_NTASKS_PER_NODE:-$((${gpus:-0} > 0 ? gpus : 1))}

# CPUs of each process, the same everywhere: of 64(x2),48 the least counts.
cpus=$SLURM_CPUS_ON_NODE
for part in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
  [ "${part%%(*}" -ge "$cpus" ] || cpus=${part%%(*}
done
# shellcheck disable=SC2034  # for the script that sources this
cpus=$((cpus > per_node ? cpus / per_node : 1))

# srun takes these over from the job, where they contradict its own options or each other. Without them a step gets all
# of the job's GPUs, and its processes choose by their local rank.
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK \
  SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET
# Without it sbatch --export=NONE would hold for srun, too, and the processes would find nothing.
export SLURM_EXPORT_ENV=ALL

# All ranks meet on the first node. They would ask Slurm themselves, which a container does not have inside. The port is
# theirs: it follows from the numbers of job, start and step, so that no two of them clash.
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then # what Slurm itself dials; an unknown name torch would try for ever
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" -o | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
  fi
  export MASTER_ADDR
fi
