"""Every environment variable that Mythos sets for the libraries under it, and only where the user has not.

Sites set what depends on their network (NCCL_SOCKET_IFNAME and the like) in slurm/env.sh.
"""

import os
from collections.abc import MutableMapping

import torch


def set_variables(device: torch.device, environ: MutableMapping[str, str]) -> None:
    """Set what this process's libraries read. Called before the first collective and before DeepSpeed is imported."""
    for name, value in defaults(device).items():
        environ.setdefault(name, value)
    if "OMP_NUM_THREADS" not in environ:
        # OpenMP has read the environment when torch was imported: this process is told by call, its children by name.
        threads = threads_per_process(environ)
        environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def defaults(device: torch.device) -> dict[str, str]:
    """Variable -> value for this kind of device."""
    common = {"DS_ACCELERATOR": device.type}
    if device.type != "cuda":
        return common
    return common | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic
        "NCCL_DEBUG": "WARN",  # an error of the network names the interface and the peer
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that timed out ends the process instead of hanging it
    }


def threads_per_process(environ: MutableMapping[str, str]) -> int:
    """This process's share of the cores: what Slurm gave each task, or the node's cores over its processes."""
    if environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return max(1, min(int(environ["SLURM_CPUS_PER_TASK"]), len(os.sched_getaffinity(0))))
    return max(1, len(os.sched_getaffinity(0)) // int(environ.get("LOCAL_WORLD_SIZE", "1")))
