# shellcheck shell=bash
# The only file that depends on the cluster, for bash and zsh. Every job sources it on its first node. Source it also in
# the shell that you submit from (`. slurm/env.sh`), because sbatch reads the partition and the account there. It works
# unchanged where the cluster's defaults fit.

# Partition and account of the jobs, for example site_partition=gpu. Empty: the cluster's defaults.
site_partition=
site_account=

# Environment modules to load, for example site_modules=(cuda/12.8 python/3.12).
site_modules=()

# The command that the jobs run, as an array of words. In a container, for example:
# MYTHOS=(apptainer exec --nv /shared/mythos.sif mythos)
MYTHOS=(mythos)

# Virtual environment to activate if there is no `mythos` on the path yet. The README's installation for clusters creates
# .venv; `make setup` would also install an mpiexec, which hides the cluster's own.
site_venv=.venv

# Network interface between the nodes, for example ib0 (`ip -brief address` lists them). Empty: NCCL and gloo choose.
site_interface=

# Large shared directory, in which configs/run/pretrain.yaml finds data/ and creates runs/. Empty: the repository.
site_scratch=

# Directory on each node's local disk for code that Triton and PyTorch compile; a shared home is slow. Only you may be
# able to write to it, because they execute what is there: for example /local/$USER. Empty: defaults.
site_compile_cache=

# How often a job may requeue itself after a preemption, its time limit or the loss of a node.
: "${MAX_REQUEUES:=100}"

# ---- nothing below needs a change; variables that are already set are kept

[ -z "$site_partition" ] || export SBATCH_PARTITION="${SBATCH_PARTITION:-$site_partition}"
[ -z "$site_account" ] || export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-$site_account}"
if [ ${#site_modules[@]} -gt 0 ] && ! module load "${site_modules[@]}"; then
  echo "slurm/env.sh: module load ${site_modules[*]} failed: see site_modules there" >&2
  return 1
fi
if ! command -v "${MYTHOS[@]:0:1}" >/dev/null && [ -f "$site_venv/bin/activate" ]; then
  # shellcheck source=/dev/null
  . "$site_venv/bin/activate"
fi
if [ -n "$site_interface" ]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$site_interface}"
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$site_interface}"
fi
[ -z "$site_scratch" ] || export MYTHOS_SCRATCH="${MYTHOS_SCRATCH:-$site_scratch}"
if [ -n "$site_compile_cache" ]; then
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$site_compile_cache/triton}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$site_compile_cache/inductor}"
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$site_compile_cache/extensions}"
fi
unset site_partition site_account site_modules site_venv site_interface site_scratch site_compile_cache
