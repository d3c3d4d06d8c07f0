"""The files of exported weights: which file holds which weight of the plain model."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.readers import LARGE_FILE_BYTES, read_json

INDEX_FILE = "model.safetensors.index.json"
REMEDY = "run `mythos export` again"


class _Index(TypedDict):
    """What is read of the index: the file that holds each weight."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^model-\d+-of-\d+\.safetensors$")]]


_INDEX = TypeAdapter(_Index)


def read_index(directory: Path) -> dict[str, str]:
    """The file of each weight. Raises UserError."""
    files: dict[str, str] = read_json(directory / INDEX_FILE, _INDEX, REMEDY, LARGE_FILE_BYTES)["weight_map"]
    return files
