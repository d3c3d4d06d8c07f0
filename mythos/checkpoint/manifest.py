"""The manifest of a checkpoint: the size and hash of every file, and where the elements of each parameter are."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

import xxhash
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.errors import UserError
from mythos.files import hash_file, write_atomically
from mythos.plan.moments import SECOND_MOMENT, moments_before
from mythos.readers import LARGE_FILE_BYTES, Count, check_value, json_object, read_utf8
from mythos.run.directory import MANIFEST_FILE, STATE_FILE

FORMAT_VERSION = 1
REMEDY = "restore this checkpoint, or choose another one"
Side = Annotated[int, Field(gt=0, le=2**53)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


def weights_file(number: int) -> str:
    """Name of the file with the weights of rank ``number``."""
    return f"weights_{number:05d}.safetensors"


def optimizer_file(number: int) -> str:
    """Name of the file with the optimizer state of rank ``number``."""
    return f"optimizer_{number:05d}.safetensors"


class WrongFormat(UserError):
    """The checkpoint was written by another version of Mythos; it is not damaged."""


class FileRecord(NamedTuple):
    """Size and hash of a file as it was written."""

    bytes: Count
    xxh3_64: Hash

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file that has just been written. Raises OSError."""
        return cls(path.stat().st_size, hash_file(path))


class ShardRecord(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter, in files ``weights_n`` and ``optimizer_n``."""

    file_number: Count
    start: Count
    stop: Count
    optimizer_steps: Annotated[float, Field(ge=0, le=2**53)]
    """Updates of these elements so far."""

    @property
    def elements(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True)
class SavedParameter:
    """A parameter of the model: its full shape, and the shards that hold its elements."""

    shape: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    matrix: tuple[int, int] | None = None
    """Rows and columns of the matrices in it that have second moments; None if it has none."""

    def state_before(self, state: str, element: int) -> int:
        """How many numbers of a state tensor are kept with the elements before ``element``."""
        return element if state != SECOND_MOMENT or self.matrix is None else moments_before(self.matrix, element)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    files: dict[str, FileRecord]
    parameters: dict[str, SavedParameter]

    @property
    def bytes(self) -> int:
        """Size of all listed files."""
        return sum(file.bytes for file in self.files.values())

    @cached_property
    def shards_by_file(self) -> dict[int, dict[str, ShardRecord]]:
        """The shards of each pair of files, by the number of the file and the name of the parameter."""
        found: dict[int, dict[str, ShardRecord]] = {}
        for name, parameter in self.parameters.items():
            for shard in parameter.shards:
                found.setdefault(shard.file_number, {})[name] = shard
        return found

    def save(self, directory: Path) -> None:
        """Write manifest.json with a hash of its own content. Raises OSError."""
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "files": self.files,
            "parameters": {
                name: {"shape": parameter.shape, "pieces": parameter.shards}
                | ({} if parameter.matrix is None else {"matrix": parameter.matrix})
                for name, parameter in self.parameters.items()
            },
        }
        write_atomically(directory / MANIFEST_FILE, json.dumps(content | {"xxh3_64": _digest(content)}))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read manifest.json.

        Raises:
            UserError: it is missing or damaged.
            WrongFormat: another version of Mythos wrote it.
        """
        path = directory / MANIFEST_FILE
        content = json_object(path, read_utf8(path, REMEDY, LARGE_FILE_BYTES), REMEDY)
        if content.pop("xxh3_64", None) != _digest(content):
            raise UserError(f"{path}: damaged, its content does not match its hash: {REMEDY}")
        if content.get("format_version") != FORMAT_VERSION:
            raise WrongFormat(
                f"{path}: format_version {content.get('format_version')!r}, this Mythos reads {FORMAT_VERSION}: "
                "use the Mythos that wrote it"
            )
        checked = check_value(path, content, _CONTENT, REMEDY)
        manifest = cls(
            step=checked["step"],
            files=checked["files"],
            parameters={
                name: SavedParameter(entry["shape"], entry["pieces"], entry.get("matrix"))
                for name, entry in checked["parameters"].items()
            },
        )
        if problem := manifest._problem():
            raise UserError(f"{path}: damaged ({problem}): {REMEDY}")
        return manifest

    def _problem(self) -> str | None:
        """What is contradictory: the listed files are those that are read, and the shards tile every parameter."""
        ranks = len(self.files) // 2
        expected = {STATE_FILE, *(name(number) for name in (weights_file, optimizer_file) for number in range(ranks))}
        if wrong := sorted(expected ^ set(self.files)):
            found = "listed" if wrong[0] in self.files else "missing"
            return f"{wrong[0]!r} is {found} in a checkpoint of {ranks} ranks"
        for name, parameter in self.parameters.items():
            if problem := _tiling_problem(math.prod(parameter.shape), parameter.shards, ranks):
                return f"{name}: {problem}"
            if parameter.matrix is not None and math.prod(parameter.shape) % math.prod(parameter.matrix):
                return f"{name}: matrices of shape {parameter.matrix} do not fill {parameter.shape}"
        return None


class _Parameter(TypedDict):
    """A parameter in manifest.json."""

    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    pieces: tuple[ShardRecord, ...]
    matrix: NotRequired[tuple[Side, Side]]


class _Content(TypedDict):
    """The content of manifest.json."""

    step: Count
    files: dict[str, FileRecord]
    parameters: dict[str, _Parameter]


_CONTENT = TypeAdapter(_Content)


def _tiling_problem(elements: int, shards: Sequence[ShardRecord], ranks: int) -> str | None:
    """Why the shards do not hold each of a parameter's elements once; None if they do."""
    if len({shard.file_number for shard in shards}) < len(shards):
        return "a file holds two shards of it"
    end = 0
    for shard in sorted(shards, key=lambda shard: shard.start):
        if shard.file_number >= ranks:
            return f"a shard in {weights_file(shard.file_number)}, which is not listed"
        if shard.start != end or shard.stop <= shard.start:
            return f"elements {shard.start} to {shard.stop} follow {end}"
        end = shard.stop
    return None if end == elements else f"the shards hold {end} of {elements} elements"


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
