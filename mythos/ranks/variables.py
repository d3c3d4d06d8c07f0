"""The environment variables that Mythos sets for the libraries it uses; a value that the user has set is kept.

What depends on a cluster's network (NCCL_SOCKET_IFNAME and the like) is set in slurm/env.sh. No torch is needed here.
"""

import os
from collections.abc import Mapping, MutableMapping


def set_training_variables(device_type: str, environ: MutableMapping[str, str]) -> None:
    """Set the variables of training and evaluation: before the first collective, before DeepSpeed is imported.

    Args:
        device_type: cpu or cuda.
    """
    environ.setdefault("DS_ACCELERATOR", device_type)
    environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(environ)))
    if device_type == "cuda":
        environ.setdefault("NCCL_DEBUG", "WARN")  # errors then name the network interface and the peer
        # The number of sequences that are due changes from loop step to loop step: blocks of fixed sizes would fragment
        # the memory. torch reads the variable at the first allocation; it also knows it by its older name.
        if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
            environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def set_data_variables(environ: MutableMapping[str, str]) -> None:
    """Set the variables of `mythos data`: before the tokenizers library has started any thread.

    There is one process per core, so each tokenizes in one thread.
    """
    environ.setdefault("RAYON_NUM_THREADS", "1")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def threads_per_process(environ: Mapping[str, str]) -> int:
    """This process's share of the cores: what Slurm gave each task, or the node's cores divided by its processes."""
    cores = len(os.sched_getaffinity(0))
    if environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        return max(1, min(int(environ["SLURM_CPUS_PER_TASK"]), cores))
    return max(1, cores // int(environ.get("LOCAL_WORLD_SIZE", "1")))
