"""The directory of a run: made on the first start, checked on every later one.

``config.yaml`` is what the run trains, ``environment.json`` a list of where each of its lives ran.
"""

import fcntl
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
from typing import Any, TextIO

import yaml

from mythos.config.load import differences, options, to_dict
from mythos.config.schema import Config
from mythos.data.format import TOKENIZER_FILE
from mythos.errors import UserError
from mythos.files import write_atomically
from mythos.run.console import log

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
LOG_DIRECTORY = "log"
"""A batch script may have put its own log there before the run makes the rest."""
ENVIRONMENT_FILE = "environment.json"
LOCK_PATIENCE_S = 1.0
"""For a life that is just ending, and for a reader that looks whether the directory is locked."""
LOCK_PATIENCE_AFTER_RESTART_S = 300.0
"""For the life before a restart by Slurm: a file server keeps the locks of a lost node for a while."""
JOB_VARIABLES = ("SLURM_JOB", "SLURM_RESTART_COUNT", "SLURM_ARRAY_")
NEVER_CHANGEABLE = ("model.", "data.sequence_length")
"""Options without which the saved weights and the position in the data mean nothing."""
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "mosaicml-streaming", "mythos")


def prepare(config: Config, accept_changes: bool) -> dict[str, tuple[Any, Any]]:
    """Make the run directory, or check that it belongs to this configuration; rank 0 only.

    Returns:
        The options that differ from the run's last start, with the old and the new value; they are allowed to.
        ``config.yaml`` still holds the old ones: ``write_config`` follows once everything else was found to fit.

    Raises:
        UserError: the directory cannot be written, or it holds a run that another configuration defines.
    """
    directory, changed = Path(config.run.directory), {}
    try:
        if (directory / CONFIG_FILE).exists():
            changed = _check_same_run(directory / CONFIG_FILE, config, accept_changes)
        elif directory.exists() and any(path.name != LOG_DIRECTORY for path in directory.iterdir()):
            raise UserError(
                f"run.directory = {config.run.directory!r}: not empty and no run ({CONFIG_FILE} is missing): "
                "choose another directory"
            )
        else:
            directory.mkdir(parents=True, exist_ok=True)
            write_config(config)
        for name in ("checkpoints", LOG_DIRECTORY, "tensorboard"):
            (directory / name).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.directory = {config.run.directory!r}: {error.strerror} ({error.filename}): choose a directory "
            "that can be written"
        ) from error
    return changed


def write_config(config: Config) -> None:
    """Write the configuration that the run goes on with; rank 0 only."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_atomically(Path(config.run.directory) / CONFIG_FILE, text)


def keep_tokenizer(directory: Path, tokenizer: Path) -> None:
    """Copy the data's tokenizer beside the configuration: with it the run can be exported without its data."""
    write_atomically(directory / TOKENIZER_FILE, tokenizer.read_text())


def lock(directory: Path) -> TextIO | None:
    """Keep other processes from training in the same directory, as long as the returned file is open; rank 0 only.

    Raises:
        UserError: another process does already.
    """
    file = open(directory / LOCK_FILE, "a+")  # noqa: SIM115 - open for the whole run
    try:
        taken = _take(file, LOCK_PATIENCE_S, every_s=0.05)
        file.seek(0)
        holder = file.read().strip()
        if not taken and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            log.warning(f"{directory}: locked by {holder}: waiting up to {LOCK_PATIENCE_AFTER_RESTART_S:g} s")
            taken = _take(file, LOCK_PATIENCE_AFTER_RESTART_S, every_s=1.0)
    except OSError:  # a file system without locks
        file.close()
        return None
    if not taken:
        raise UserError(f"{directory}: {holder} trains here: wait for it, or stop it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {host_name()}")
    file.flush()
    return file


def _take(file: TextIO, patience_s: float, every_s: float) -> bool:
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(every_s)


def is_locked(directory: Path) -> bool:
    """Whether a process trains there, as far as locks tell: on some shared file systems only those of this host."""
    try:
        with open(directory / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody has ever trained there, or no locks
        return False
    return False


def _check_same_run(saved: Path, config: Config, accept_changes: bool) -> dict[str, tuple[Any, Any]]:
    try:
        before = yaml.safe_load(saved.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{saved}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(before, dict) or not isinstance(before.get("model"), dict):
        raise UserError(f"{saved}: damaged, not a configuration: restore it, or choose another run.directory")
    changed = differences(before, to_dict(config))
    known = options()
    # An option that this version does not know, or did not then, has no word in it.
    breaking = [
        path
        for path in changed
        if path in known and not known[path].json_schema_extra["changeable"]  # type: ignore[index,call-overload]
    ]
    never = [path for path in breaking if path.startswith(NEVER_CHANGEABLE)]
    if never or (breaking and not accept_changes):
        lines = "\n".join(f"  {path}: {changed[path][0]!r} -> {changed[path][1]!r}" for path in breaking)
        remedy = "Choose another run.directory" + ("" if never else ", or go on with the changes: --accept-changes")
        raise UserError(f"{saved.parent} holds a run with another configuration:\n{lines}\n{remedy}")
    return changed


def record_environment(directory: Path, hosts: list[str], device: str, precision: str) -> None:
    """Append this life of the run to environment.json; rank 0 only."""
    path = directory / ENVIRONMENT_FILE
    lives = _read_lives(path)
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
            "slurm": {name: value for name, value in os.environ.items() if name.startswith(JOB_VARIABLES)},
        }
    )
    write_atomically(path, json.dumps(lives, indent=2))


def _read_lives(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lives = json.loads(path.read_text())
    except ValueError:
        lives = None
    if isinstance(lives, list):
        return lives
    os.replace(path, path.with_suffix(".damaged"))  # a record, which must not keep the run from going on
    return []


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
