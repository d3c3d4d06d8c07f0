"""The directory of a run: made on the first start, checked on every later one.

``config.yaml`` is what the run trains, ``environment.json`` a list of where each of its lives ran.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from mythos.config.load import differences, options, to_dict
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.files import write_atomically

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "mosaicml-streaming", "mythos")


def prepare(config: Config, accept_changes: bool) -> dict[str, tuple[Any, Any]]:
    """Make the run directory, or check that it belongs to this configuration; rank 0 only.

    Returns:
        The options that differ from the run's last start, with the old and the new value; they are allowed to.

    Raises:
        UserError: the directory cannot be written, or it holds a run that another configuration defines.
    """
    directory = Path(config.run.directory)
    changed = {}
    try:
        saved = directory / CONFIG_FILE
        if saved.exists():
            changed = _check_same_run(saved, config, accept_changes)
        elif directory.exists() and any(directory.iterdir()):
            raise UserError(
                f"run.directory = {config.run.directory!r}: not empty and no run ({CONFIG_FILE} is missing): "
                "choose another directory"
            )
        for name in ("checkpoints", "log", "tensorboard"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        write_atomically(saved, yaml.safe_dump(to_dict(config), sort_keys=False))
    except OSError as error:
        raise UserError(
            f"run.directory = {config.run.directory!r}: {error.strerror} ({error.filename}): choose a directory "
            "that can be written"
        ) from error
    return changed


def _check_same_run(saved: Path, config: Config, accept_changes: bool) -> dict[str, tuple[Any, Any]]:
    try:
        before = yaml.safe_load(saved.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{saved}: damaged: {' '.join(str(error).split())}") from error
    changed = differences(before, to_dict(config))
    known = options()
    breaking = [path for path in changed if path not in known or not known[path].json_schema_extra["changeable"]]  # type: ignore[index,call-overload]
    if breaking and not accept_changes:
        lines = "\n".join(f"  {path}: {changed[path][0]!r} -> {changed[path][1]!r}" for path in breaking)
        raise UserError(
            f"{saved.parent} holds a run with another configuration:\n{lines}\n"
            "Choose another run.directory, or go on with the changes: --accept-changes"
        )
    return changed


def record_environment(directory: Path, hosts: list[str], device: str, precision: str) -> None:
    """Append this life of the run to environment.json; rank 0 only."""
    path = directory / ENVIRONMENT_FILE
    lives = json.loads(path.read_text()) if path.exists() else []
    lives.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "hosts": hosts,
            "ranks": len(hosts),
            "device": device,
            "precision": precision,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "slurm": {name: value for name, value in os.environ.items() if name.startswith("SLURM_JOB")},
        }
    )
    write_atomically(path, json.dumps(lives, indent=2))


def host_name() -> str:
    """The node that this rank runs on."""
    return socket.gethostname()


def _git_commit() -> str | None:
    """The commit of the source tree, with a mark if it was changed; None where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
