"""Stands in for ``mythos.config.option`` in an export: sections as plain dataclasses, whose values are not checked."""

from dataclasses import MISSING, dataclass, field
from typing import Any

section = dataclass(frozen=True, kw_only=True)


def option(documentation: str, default: Any = MISSING, **unused: Any) -> Any:
    """One option."""
    return field(default=default, metadata={"documentation": documentation})


def Needs(*unused: Any) -> None:
    """The option without which another one has no effect."""


def Field(**unused: Any) -> None:
    """Tells pydantic which section of a union is meant."""
