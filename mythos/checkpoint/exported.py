"""The files of exported weights: which file holds which weight of the plain model, and under which name."""

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.readers import LARGE_FILE_BYTES, read_json

INDEX_FILE = "model.safetensors.index.json"
REMEDY = "run `mythos export` again"
PREFIX_FOR_TRANSFORMERS = "model."
"""Before the names of the weights in an export for transformers, whose models contain the plain one."""


class Place(NamedTuple):
    """Where a weight is: the file's name, and the weight's name in it."""

    file: str
    name: str


class _Index(TypedDict):
    """What is read of the index: the file that holds each weight."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^model-\d+-of-\d+\.safetensors$")]]


_INDEX = TypeAdapter(_Index)


def read_index(directory: Path) -> dict[str, Place]:
    """The place of each weight, by its name in the plain model. Raises UserError."""
    files: dict[str, str] = read_json(directory / INDEX_FILE, _INDEX, REMEDY, LARGE_FILE_BYTES)["weight_map"]
    return {name.removeprefix(PREFIX_FOR_TRANSFORMERS): Place(file, name) for name, file in files.items()}
