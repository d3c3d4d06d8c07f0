"""Tests that this machine cannot run are skipped with the reason. With CI=true they fail instead."""

import functools
import os
import shutil
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip the test (or fail it where CI=true)."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true: must not be skipped)", pytrace=False)
    pytest.skip(reason)


def require(command: str) -> str:
    """The full path of a command, by name (also in /usr/sbin, where Slurm's daemons are) or by path."""
    found = shutil.which(command, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if found is None:
        missing(f"no {command} on this machine")
    return found


def require_gpu() -> None:
    """Skip the test without a GPU, also where CI=true: it is the machine of `make gpu-check` that must have one."""
    if not _has_gpu():
        pytest.skip("torch finds no GPU on this machine")


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
