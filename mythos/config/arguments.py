"""The arguments of a command that takes a configuration."""

from collections.abc import Sequence
from pathlib import Path


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and overrides. A file's name may contain ``=`` too."""
    overrides = [part for part in arguments if _is_override(part)]
    return [part for part in arguments if not _is_override(part)], overrides


def _is_override(argument: str) -> bool:
    """Whether the argument begins with an option or, if it is not a file's path, with what may be a misspelt one."""
    from mythos.config.tree import find  # so that `mythos --help` does not wait for the configuration tree

    name, separator, _ = argument.partition("=")
    is_file = "/" in name or Path(argument).is_file()
    return bool(separator) and (find(name) is not None or not is_file)
