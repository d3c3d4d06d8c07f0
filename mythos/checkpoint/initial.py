"""Fills a new run's model with the weights of another run, or of exported ones: not its optimizer state, nor its step.

Every rank reads the elements that it updates, so the layouts of the two runs do not matter. Parameters are matched by
name; both models name those of experts alike, however they are distributed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mythos.checkpoint import restore
from mythos.checkpoint.exported import INDEX_FILE, read_index
from mythos.checkpoint.reader import CheckpointReader
from mythos.checkpoint.trained import find_trained
from mythos.config.schema import Train
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.files import check_regular
from mythos.model.moe import plain_parameters
from mythos.ranks.group import agree, from_rank_0
from mythos.readers import one_line
from mythos.run.console import log

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]

NAMES_SHOWN = 8
OPTION, WITHOUT = "train.initial_weights", "train.initial_weights_without"


class Weights(Protocol):
    """Where initial weights come from."""

    shapes: Shapes
    """Of every parameter, by its name in the training engine."""

    def weights(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill ``out`` with elements of a flattened parameter."""

    def buffers(self) -> dict[str, Tensor]:
        """The model's state besides its parameters, by name."""


class SavedWeights(CheckpointReader):
    """Those of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.shapes: Shapes = {name: parameter.shape for name, parameter in self.manifest.parameters.items()}


class ExportedWeights:
    """Those that `mythos export` has written, where a parameter of experts may be a part of an exported one.

    Args:
        parameters, buffers: the names of those of the training engine.

    Raises:
        UserError, OSError, SafetensorError: they cannot be read.
    """

    def __init__(self, directory: Path, parameters: Iterable[str], buffers: Iterable[str]) -> None:
        files = read_index(directory)
        names = {place.file for place in files.values()}
        for name in names:
            check_regular(directory / name)
        opened = {name: safe_open(str(directory / name), "pt") for name in names}
        self._saved = {name: (opened[place.file], place.name) for name, place in files.items()}
        self._buffers = [name for name in buffers if name in files]
        split = {plain: parts for plain, parts in plain_parameters(parameters).items() if plain in files}
        whole = {name: (name,) for name in files if name not in split and name not in self._buffers}
        self._places = {
            part: (plain, number, len(parts))
            for plain, parts in (split | whole).items()
            for number, part in enumerate(parts)
        }
        self.shapes: Shapes = {name: self._shape(*place) for name, place in self._places.items()}

    def weights(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """See ``Weights``."""
        plain, number, parts = self._places[name]
        tensor = self._tensor(plain)
        out.copy_((tensor.chunk(parts, dim=1)[number] if parts > 1 else tensor).reshape(-1)[start:stop])

    def buffers(self) -> dict[str, Tensor]:
        """See ``Weights``."""
        return {name: self._tensor(name) for name in self._buffers}

    def _tensor(self, plain: str) -> Tensor:
        file, name = self._saved[plain]
        return file.get_tensor(name)

    def _shape(self, plain: str, _: int, parts: int) -> tuple[int, ...]:
        file, name = self._saved[plain]
        first, *others = file.get_slice(name).get_shape()
        return (first, others[0] // parts, *others[1:]) if parts > 1 else (first, *others)


def load_initial_weights(engine: TrainingEngine, options: Train, progress: restore.Progress) -> None:
    """Fill the engine with the weights of ``train.initial_weights``, and report what they do not cover. Collective.

    Raises:
        UserError: they cannot be read, or do not fit the model.
    """
    assert options.initial_weights is not None
    given, without = Path(options.initial_weights), options.initial_weights_without or ()
    place = from_rank_0(lambda: find_trained(given, None, f"{OPTION} = {str(given)!r}"))
    if not (place / INDEX_FILE).exists():
        restore.check(place, progress)
    source = agree(lambda: _readable(place, lambda: _open(place, engine)))
    names = agree(lambda: matching(engine.shapes(), source.shapes, without))
    agree(lambda: _readable(place, lambda: _fill(engine, source, names, progress)))
    engine.refresh_weights()
    log.info(f"initial weights of {len(names)} of {len(engine.shapes())} parameters from {place}")
    fresh, unused = set(engine.shapes()) - set(names), set(source.shapes) - set(names)
    for what, those in (("with fresh weights", fresh), (f"of {place.name} that are not used", unused)):
        if those:
            more = f" and {len(those) - NAMES_SHOWN} more" if len(those) > NAMES_SHOWN else ""
            log.warning(f"parameters {what}: {', '.join(sorted(those)[:NAMES_SHOWN])}{more}")


def matching(own: Shapes, theirs: Shapes, without: Sequence[str]) -> list[str]:
    """The parameters that both have, except those that are left out.

    Args:
        without: names of parameters or of modules, in which * stands for any text.

    Raises:
        UserError: a shape differs, a part to leave out is in neither, or nothing is left.
    """

    def belongs(name: str, part: str) -> bool:
        return fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")

    for part in without:
        if not any(belongs(name, part) for name in (*own, *theirs)):
            raise UserError(f"{WITHOUT} = {part!r}: no parameter has this name; the model has {', '.join(own)}")
    names = [name for name in own if name in theirs and not any(belongs(name, part) for part in without)]
    if not names:
        raise UserError(f"{OPTION}: no parameter of the model is in it: it has {', '.join(theirs)}")
    for name in names:
        if own[name] != theirs[name]:
            raise UserError(
                f"{OPTION}: {name} has the shape {list(theirs[name])} there and {list(own[name])} here: choose the "
                f"same model, or leave it out: {WITHOUT}=[{name}]"
            )
    return names


def _open(place: Path, engine: TrainingEngine) -> Weights:
    if (place / INDEX_FILE).exists():
        return ExportedWeights(place, engine.shapes(), engine.buffers())
    return SavedWeights(place)


def _fill(engine: TrainingEngine, source: Weights, names: Sequence[str], progress: restore.Progress) -> None:
    wanted = set(names)
    for shard in engine.shards():
        progress("reading initial weights")
        if shard.name in wanted:
            source.weights(shard.name, shard.start, shard.stop, shard.weights(shard.start, shard.stop))
    loaded = {name: buffer for name, buffer in source.buffers().items() if _goes_with(name, wanted)}
    engine.set_buffers(engine.buffers() | loaded)


def _goes_with(buffer: str, names: Iterable[str]) -> bool:
    """Whether a parameter of the buffer's module is loaded."""
    module = buffer.rpartition(".")[0]
    return any(name.startswith(f"{module}.") for name in names)


def _readable(place: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{place}: cannot be read ({one_line(str(error))}): give other {OPTION}") from error
