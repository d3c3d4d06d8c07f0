"""The batch scripts outside Slurm: the environment of a job, and programs in place of Slurm's and `mythos`."""

import os
from collections.abc import Mapping
from pathlib import Path

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_CPUS_PER_NODE": "1(x2)",
    "SLURM_CPUS_ON_NODE": "1",
}


def job_environment(directory: Path, programs: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job on two nodes, in which these programs, given as shell scripts, are found first."""
    directory.mkdir(exist_ok=True)
    for name, script in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (directory / name).chmod(0o755)
    return JOB | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
