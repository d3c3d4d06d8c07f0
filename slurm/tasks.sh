# shellcheck shell=bash
# How a job's processes lie on its nodes: one a GPU, unless --ntasks-per-node says otherwise (on CPU nodes: give it, with
# --gpus-per-node=0). Jobs do not ask for tasks themselves: Slurm 22.05 keeps the number of tasks of the first start, so
# that with --ntasks-per-node a job with a range of nodes waits for the lost node for ever.

per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# shellcheck disable=SC2034  # for the script that sources this
cpus=$((SLURM_CPUS_ON_NODE > per_node ? SLURM_CPUS_ON_NODE / per_node : 1))
# srun refuses --cpus-per-gpu, which it takes over from the job, where there are no GPUs.
[ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] || unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU
