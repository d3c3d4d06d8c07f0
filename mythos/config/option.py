"""How a section of the configuration tree and one option in it are declared."""

from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

section = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def option(
    documentation: str,
    default: Any = MISSING,
    *,
    changeable: bool = False,
    default_factory: Callable[[], Any] | None = None,
    **bounds: Any,
) -> Any:
    """One option. ``changeable`` options may differ when a run is resumed, the others only if the user agrees."""
    if default_factory is not None:
        bounds["default_factory"] = default_factory
    elif default is not MISSING:
        bounds["default"] = default
    return Field(description=documentation, json_schema_extra={"changeable": changeable}, **bounds)
