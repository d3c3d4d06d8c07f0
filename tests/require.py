"""What a machine lacks skips a test, with the reason. Where CI=true nothing may be lacking: there it fails."""

import os
import shutil
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test (or fail it where CI=true)."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true: must not be skipped)", pytrace=False)
    pytest.skip(reason)


def require(command: str) -> str:
    """The full path of a command, by name (also in /usr/sbin, where Slurm's daemons are) or by path."""
    found = shutil.which(command, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if found is None:
        lacking(f"no {command} on this machine")
    return found
