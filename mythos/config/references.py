"""Values that come from the environment: a run's files hold the reference, ``${oc.env:NAME}``, and not the value."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mythos.config.layers import merge
from mythos.config.load import flatten, to_dict
from mythos.config.schema import Config
from mythos.config.yaml_file import Unescaped, dump

ENVIRONMENT = "${oc.env:"
RUN_DIRECTORY = "run.directory"


class Reference(NamedTuple):
    """An option's text in the configuration, and the value that it has."""

    text: str
    value: Any


NO_REFERENCES: Mapping[str, Reference] = MappingProxyType({})


def references(files: Sequence[str | Path], overrides: Sequence[str]) -> dict[str, Reference]:
    """The text options whose value comes from the environment, by their dotted paths.

    Without ``run.directory``, where the files themselves are, and numbers, such as a seed from a job array's task: the
    run is read elsewhere, too, where there may be no such variable.

    Raises:
        UserError: as ``load``.
    """
    given, values = (flatten(merge(files, overrides, resolve=resolve)) for resolve in (False, True))
    return {
        path: Reference(text, values[path])
        for path, text in given.items()
        if isinstance(text, str) and ENVIRONMENT in text and isinstance(values[path], str) and path != RUN_DIRECTORY
    }


def with_references(config: Config, known: Mapping[str, Reference]) -> dict[str, Any]:
    """The configuration as a tree for a file; options that still have the value of a reference hold the reference."""
    tree = to_dict(config)
    for path, reference in known.items():
        *sections, name = path.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section) or {}
        if place.get(name) == reference.value:
            place[name] = Unescaped(reference.text)
    return tree


def config_text(config: Config, known: Mapping[str, Reference]) -> str:
    """The text of a run's config.yaml."""
    return dump(with_references(config, known))
