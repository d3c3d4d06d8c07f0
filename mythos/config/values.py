"""The value of an option from its text. The option's type decides, not what the text looks like.

A text option keeps its text. Elsewhere ``true`` and ``false`` are booleans and numbers are decimal: 10, 1_000, 0.5,
1e-3, .inf. Other text remains text, which the option then refuses. ``~`` at the start of a path is the home directory.
"""

import os
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mythos.config.option import is_path
from mythos.config.tree import find, options

INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]{3})*")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
WORDS = {
    "true": True,
    "false": False,
    ".inf": float("inf"),
    "+.inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}


def typed(tree: Any, path: str = "") -> Any:
    """The tree with values in place of text. Text with a reference to another option stays as it is."""
    if isinstance(tree, dict):
        return {name: typed(value, f"{path}.{name}".removeprefix(".")) for name, value in tree.items()}
    if isinstance(tree, list):
        return [typed(value, path) for value in tree]
    if not isinstance(tree, str) or "${" in tree:
        return tree
    field = find(path)
    if field is None or not takes_text(field):
        return _plain(tree)
    if takes_booleans(field):
        return WORDS.get(tree.lower(), tree)
    return os.path.expanduser(tree) if is_path(field) else tree


def takes_text(field: FieldInfo) -> bool:
    """Whether the option's value is a text or one of several words."""
    return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(field))


def takes_booleans(field: FieldInfo) -> bool:
    """Whether true and false are among the words that the option takes."""
    return get_origin(field.annotation) is Literal and True in get_args(field.annotation)


def is_free_text(field: FieldInfo) -> bool:
    """Whether any text is a value of the option."""
    return str in _alternatives(field)


def takes_null(field: FieldInfo) -> bool:
    """Whether null is a value of the option."""
    return type(None) in _alternatives(field)


def named_sections() -> list[str]:
    """The dotted paths of sections by name, such as ``data.sources``."""
    return [path for path, field in options().items() if get_origin(field.annotation) is dict]


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """The members of a union, and the type itself where it is none."""
    kind = field.annotation
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _plain(text: str) -> Any:
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else WORDS.get(text.lower(), text)
