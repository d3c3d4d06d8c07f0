"""The manifest of a checkpoint: the size and hash of every file, and where the elements of each parameter are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mythos.errors import UserError
from mythos.files import hash_file, write_atomically
from mythos.run.directory import MANIFEST_FILE

FORMAT_VERSION = 1


class WrongFormat(UserError):
    """The checkpoint was written by another version of Mythos; it is not damaged."""


class FileRecord(NamedTuple):
    """Size and hash of a file as it was written."""

    bytes: int
    xxh3_64: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file that has just been written. Raises OSError."""
        return cls(path.stat().st_size, hash_file(path))


class ShardRecord(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter, in files ``weights_n`` and ``optimizer_n``."""

    file_number: int
    start: int
    stop: int
    optimizer_steps: float
    """Updates of these elements so far."""


@dataclass(frozen=True)
class SavedParameter:
    """A parameter of the model: its full shape, and the shards that hold its elements."""

    shape: tuple[int, ...]
    shards: tuple[ShardRecord, ...]


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

    def save(self, directory: Path) -> None:
        """Write manifest.json with a hash of its own content. Raises OSError."""
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "files": self.files,
            "parameters": {
                name: {"shape": parameter.shape, "pieces": parameter.shards}
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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if not isinstance(content, dict) or content.pop("xxh3_64", None) != _digest(content):
            raise UserError(f"{path}: damaged, its content does not match its hash")
        if content["format_version"] != FORMAT_VERSION:
            raise WrongFormat(
                f"{path}: format_version {content['format_version']}, this Mythos reads {FORMAT_VERSION}: "
                "use the Mythos that wrote it"
            )
        return cls(
            step=content["step"],
            files={name: FileRecord(*record) for name, record in content["files"].items()},
            parameters={
                name: SavedParameter(tuple(entry["shape"]), tuple(ShardRecord(*shard) for shard in entry["pieces"]))
                for name, entry in content["parameters"].items()
            },
        )


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
