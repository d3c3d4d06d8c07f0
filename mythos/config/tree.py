"""The schema as data: its options by dotted path, and its unions, in which ``kind`` chooses one of several sections."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mythos.config.schema import Config


@cache
def options() -> dict[str, FieldInfo]:
    """Dotted path -> field of every option and section of the tree, the options of all kinds included.

    NAME stands for a name that the user chooses.
    """
    return dict(_options(Config, ""))


def find(path: str) -> FieldInfo | None:
    """The option or section at a dotted path, which may contain names that the user chose; None if there is none."""
    sections: list[Any] = [Config]
    field, is_name = None, False
    for part in path.split("."):
        if is_name:
            is_name = False
            continue
        field = next((s.__pydantic_fields__[part] for s in sections if part in s.__pydantic_fields__), None)
        if field is None:
            return None
        sections, is_name = sections_in(field.annotation), get_origin(field.annotation) is dict
    return field


def similar(path: str) -> str | None:
    """The option whose path is most similar to a wrong one."""
    return next(iter(difflib.get_close_matches(path, options(), n=1, cutoff=0.6)), None)


def sections_in(annotation: Any) -> list[Any]:
    """The sections that a field with this annotation may hold."""
    return [kind for kind in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(kind)]


@cache
def unions() -> dict[str, dict[str, Any]]:
    """Dotted path -> its sections by kind, for every part of the tree whose ``kind`` chooses a section."""
    return {
        path: {_kind(section): section for section in sections_in(field.annotation)}
        for path, field in options().items()
        if field.discriminator
    }


def default_kind(path: str) -> str | None:
    """The kind of a union where none is given; None if it must be given."""
    defaults = {section.__pydantic_fields__["kind"].default for section in unions()[path].values()}
    return next(iter(defaults - {PydanticUndefined}), None)


def kinds_with(path: str) -> list[str]:
    """The kinds of the union at the path's parent that have this option."""
    union, _, name = path.rpartition(".")
    return [kind for kind, section in unions()[union].items() if name in section.__pydantic_fields__]


def options_of_others(union: str, kind: str) -> set[str]:
    """Names of the options that other kinds of this union have and this kind has not."""
    fields = {of: set(section.__pydantic_fields__) for of, section in unions()[union].items()}
    return set().union(*fields.values()) - fields.get(kind, set().union(*fields.values()))


def dotted(location: Sequence[int | str]) -> str:
    """pydantic's location as a dotted path: without list indices, and without the kind that follows a union."""
    path: list[str] = []
    for part in location:
        union = ".".join(path)
        is_kind = union in unions() and part in unions()[union]
        if isinstance(part, str) and not is_kind:
            path.append(part)
    return ".".join(path)


def get(tree: Any, path: str) -> Any:
    """The value at a dotted path of nested dictionaries or of a configuration; None where a part is missing."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else getattr(tree, part, None)
    return tree


def has(tree: Any, path: str) -> bool:
    """Whether a configuration or nested dictionaries have this option: sections null or of another kind have none."""
    section, _, name = path.rpartition(".")
    found = get(tree, section) if section else tree
    return name in found if isinstance(found, Mapping) else hasattr(found, name)


def remove(tree: Any, path: str) -> None:
    """Remove the option at a dotted path, if nested dictionaries have it."""
    section, _, name = path.rpartition(".")
    found = get(tree, section) if section else tree
    if isinstance(found, dict):
        found.pop(name, None)


def _options(section: Any, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.__pydantic_fields__.items():
        path = prefix + name
        yield path, field
        named = ".NAME" if get_origin(field.annotation) is dict else ""
        for inner in sections_in(field.annotation):
            yield from _options(inner, f"{path}{named}.")


def _kind(section: Any) -> str:
    return get_args(section.__pydantic_fields__["kind"].annotation)[0]
