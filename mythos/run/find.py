"""Finds run directories below a directory."""

import os
from pathlib import Path

from mythos.run.directory import RunDirectory


def is_run(directory: Path) -> bool:
    """Whether this is a run directory, even one that has lost files. An export, which has a configuration, is not."""
    run = RunDirectory(directory)
    return run.events.is_file() or run.metrics.is_file() or (run.config.is_file() and run.checkpoints.is_dir())


def find_runs(directory: Path) -> list[Path]:
    """The runs in a directory at any depth, or the directory itself if it is one; sorted.

    Hidden directories and those that cannot be read are left out.
    """
    found, visited = [], set()
    for place, names, _ in os.walk(directory, followlinks=True):
        visited.add(os.path.realpath(place))
        if is_run(Path(place)):
            found.append(Path(place))
            names.clear()  # a run contains no other
        names[:] = [
            name for name in names if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in visited
        ]
    return sorted(found)
