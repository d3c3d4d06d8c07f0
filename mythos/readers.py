"""The reader of every file that comes from outside: of a run, a checkpoint, a data set or its preparation.

Such a file may be damaged, or made by somebody else. It is read only if it is a regular file of a sane size, and what
it holds must have the types that its caller names, which exclude huge and non-finite numbers. The parsers limit how
deep values are nested. (``TypedDict`` is that of typing_extensions, because pydantic refuses that of Python 3.11.)
Everything else is a ``UserError`` of one line: PLACE: WHAT: REMEDY.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import open_regular, read_bytes

T = TypeVar("T")
FILE_BYTES = 16 << 20
LARGE_FILE_BYTES = 256 << 20
"""For manifests, indexes and tokenizers: the manifest of a checkpoint has a line for each parameter and rank."""
CONFIG_BYTES = 64 << 10
LINE_BYTES = 1 << 20
CONFIG_DEPTH = 32
REASON_CHARACTERS = 200

Count = Annotated[int, Field(strict=True, ge=0, le=2**62)]
Number = (
    Annotated[int, Field(strict=True, ge=-(2**62), le=2**62)]
    | Annotated[float, Field(strict=True, ge=-1e100, le=1e100, allow_inf_nan=False)]
)
"""Larger than any metric, small enough to be printed."""


def read_utf8(path: Path, remedy: str, limit_bytes: int = FILE_BYTES) -> str:
    """The text of a UTF-8 file. Raises UserError."""
    with os_errors_as_user_errors(path, remedy):
        content = read_bytes(path, limit_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged, not UTF-8 ({error.reason} at byte {error.start}): {remedy}") from error


def read_json(path: Path, kind: TypeAdapter[T], remedy: str, limit_bytes: int = FILE_BYTES) -> T:
    """The value in a JSON file. Raises UserError if the file cannot be read or holds another kind of value."""
    return parse_json(path, read_utf8(path, remedy, limit_bytes), kind, remedy)


def parse_json(place: object, text: str | bytes, kind: TypeAdapter[T], remedy: str) -> T:
    """The value in a JSON text that was read from ``place``. Raises UserError."""
    return _checked(place, lambda: kind.validate_json(text), remedy)


def check_value(place: object, value: object, kind: TypeAdapter[T], remedy: str) -> T:
    """A value that was read from ``place``, as another kind of value. Raises UserError."""
    return _checked(place, lambda: kind.validate_python(value), remedy)


def read_json_lines(path: Path, kind: TypeAdapter[T], last_bytes: int | None = None) -> Iterator[T]:
    """The values of a file with one JSON value on each line, in order; none if the file does not exist.

    Lines that hold another kind of value, or were cut off by a kill or a full disk, are left out.

    Args:
        last_bytes: read only this many bytes at the end of the file.

    Raises:
        UserError: the file cannot be read.
    """
    with os_errors_as_user_errors(path, "restore or remove it"):
        try:
            file = open_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, 2) - last_bytes))
            while line := file.readline(LINE_BYTES):
                try:
                    value = kind.validate_json(line)
                except ValidationError:
                    continue
                yield value


def read_yaml(path: Path, parse: Callable[[str], Any], kind: TypeAdapter[T], remedy: str) -> T:
    """The value in a YAML file. Raises UserError if the file cannot be read or holds another kind of value.

    Args:
        parse: raises yaml.YAMLError or ValueError for another text; one with aliases or deep nesting is refused before.
    """
    text = read_utf8(path, remedy, CONFIG_BYTES)
    try:
        _check_depth(text)
        value = parse(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: numbers and dates
        raise UserError(f"{path}: damaged ({one_line(str(error))}): {remedy}") from error
    return check_value(path, value, kind, remedy)


def one_line(reason: str) -> str:
    """The reason of an error of a library, short enough for a message."""
    text = " ".join(reason.split())
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]}..."


def _checked(place: object, validate: Callable[[], T], remedy: str) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = re.sub("^Invalid JSON", "not valid JSON", first["msg"])
        raise UserError(f"{place}: damaged ({one_line(': '.join(filter(None, (where, reason))))}): {remedy}") from error


def _check_depth(text: str) -> None:
    """Raises YAMLError if values are nested too deep for the parser, or refer to others, which can multiply them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("holds an alias, which no file of a run does")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > CONFIG_DEPTH:
            raise yaml.YAMLError(f"nested more than {CONFIG_DEPTH} deep")


_ANY_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def json_object(place: object, text: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a text that was read from ``place``. Raises UserError."""
    return parse_json(place, text, _ANY_OBJECT, remedy)
