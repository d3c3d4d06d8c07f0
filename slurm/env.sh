# shellcheck shell=bash
# The only file that depends on the site. Every job sources it on its first node; source it also in the shell that you
# submit from (`. slurm/env.sh`), for sbatch reads the partition and the account there. It may be left as it is.

# Partition and account of the jobs, for example partition=gpu. Empty: the cluster's defaults.
partition=
account=

# Environment modules to load, for example modules="cuda/12.8 python/3.12". Empty: none.
modules=

# The command that the jobs run, a word a line. In a container, for example:
# MYTHOS=(apptainer exec --nv /shared/mythos.sif mythos)
MYTHOS=(mythos)

# Virtual environment to use where there is no `mythos` on the path yet; .venv is what `make setup` makes.
venv=.venv

# Network interface between the nodes, for example ib0 (`ip -brief address` lists them). Empty: NCCL and gloo choose.
interface=

# Large shared directory below which configs/run/pretrain.yaml finds data/ and makes runs/. Empty: the repository.
scratch=

# Directory on each node's own disk for what Triton and PyTorch compile; a shared home is slow. Empty: their defaults.
compile_cache=

# How often a job may requeue itself after a preemption or its time limit.
: "${MAX_REQUEUES:=100}"

# ---- nothing below needs a change; what is set already wins

[ -z "$partition" ] || export SBATCH_PARTITION="${SBATCH_PARTITION:-$partition}"
[ -z "$account" ] || export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-$account}"
# shellcheck disable=SC2086  # one word a module
[ -z "$modules" ] || module load $modules
if ! command -v "${MYTHOS[0]}" >/dev/null && [ -f "$venv/bin/activate" ]; then
  # shellcheck source=/dev/null
  . "$venv/bin/activate"
fi
if [ -n "$interface" ]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
fi
[ -z "$scratch" ] || export MYTHOS_SCRATCH="${MYTHOS_SCRATCH:-$scratch}"
if [ -n "$compile_cache" ]; then
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$compile_cache/triton}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$compile_cache/inductor}"
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$compile_cache/extensions}"
fi
unset partition account modules venv interface scratch compile_cache
