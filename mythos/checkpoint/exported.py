"""Exported weights: where and under which name each weight of the plain model is, and the model that they make."""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from mythos.checkpoint.plain import values_of
from mythos.config.load import load_run
from mythos.errors import UserError
from mythos.files import check_regular
from mythos.model import Model, build_structure
from mythos.readers import LARGE_FILE_BYTES, one_line, read_json
from mythos.run.directory import CONFIG_FILE

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


def load_exported(directory: Path) -> Model:
    """Load an exported model, in evaluation mode, on the CPU and in fp32.

    Raises:
        UserError: a file is missing, or holds weights of another model.
    """
    model = build_structure(load_run(directory / CONFIG_FILE))
    wanted = values_of(model)
    try:
        places = read_index(directory)
        if set(places) != set(wanted):
            raise UserError(
                f"{directory}: weights and {CONFIG_FILE} differ: {sorted(set(places) ^ set(wanted))[:3]} ..."
            )
        for file in sorted({place.file for place in places.values()}):
            check_regular(directory / file)
            with safe_open(str(directory / file), "pt") as tensors, torch.no_grad():
                for plain, place in places.items():
                    if place.file == file:
                        wanted[plain].copy_(tensors.get_tensor(place.name))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = one_line(str(error))
        raise UserError(f"{directory}: not an exported model ({reason}): {REMEDY}") from error
    return model.eval()
