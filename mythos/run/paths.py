"""The relative paths of a run's configuration, when it is read in another folder than that in which the run started."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from mythos.config.data_schema import Data
from mythos.config.derive import data_sources
from mythos.config.schema import Config
from mythos.data.format import BOS, Manifest
from mythos.errors import UserError
from mythos.run.journal import read_attempts

T = TypeVar("T")


def found_from_here(config: Config, directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in ``directory``, with its data sets where they are found now.

    A relative path that does not exist from here is looked up in the folder in which the run was started. The run's own
    directory is ``directory``, to which it may have been moved, unless ``overrides`` name another one.

    Raises:
        UserError: a data set is in neither folder.
    """
    folders = list(_start_folders(config, directory))

    def found(name: str, path: str) -> str:
        if "://" in path or os.path.isabs(path) or Path(path).exists():
            return path
        for folder in folders:
            if (folder / path).exists():
                return str(folder / path)
        started = f" nor in {folders[0]}, where the run was started" if folders else ""
        raise UserError(f"{name} = {path!r}: not in this folder ({Path.cwd()}){started}: give {name}=PATH")

    is_overridden = any(each.startswith("run.directory=") for each in overrides)
    run = config.run if is_overridden else _replaced(config.run, directory=str(directory))
    return _replaced(config, run=run, data=_with_paths(config.data, found))


def bos_of_data(config: Config, directory: Path) -> str:
    """The token that begins each document of the run in ``directory``; the usual one where its data is not here."""
    with suppress(UserError):
        for source, _ in data_sources(found_from_here(config, directory).data).values():
            return Manifest.load(Path(source)).settings.bos
    return BOS


def _with_paths(data: Data, found: Callable[[str, str], str]) -> Data:
    sources = {
        name: _replaced(source, directory=found(f"data.sources.{name}.directory", source.directory))
        for name, source in data.sources.items()
    }
    directory = None if data.directory is None else found("data.directory", data.directory)
    return _replaced(data, directory=directory, sources=sources)


def _replaced(section: T, **changes: Any) -> T:
    changed: T = replace(cast(Any, section), **changes)
    return changed


def _start_folders(config: Config, directory: Path) -> Iterator[Path]:
    """Where the run was started, by its journal; and by its own path, if the tree that contains both was moved."""
    for attempt in reversed(read_attempts(directory)):
        if isinstance(folder := attempt.get("working_directory"), str):
            yield Path(folder)
            break
    own, given = Path(config.run.directory), directory.absolute()
    if not own.is_absolute() and given.parts[-len(own.parts) :] == own.parts:
        yield Path(*given.parts[: -len(own.parts)])
