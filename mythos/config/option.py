"""How a section of the configuration tree and one option in it are declared."""

from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

section = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))

Change = Literal["free", "rate", "ask", "never"]
"""How an option may change when a run is resumed: freely, with ``--accept``, or not at all.

``rate``: freely, unless that changes the learning rate at the step where the run resumes; then with ``--accept``.
"""


LARGEST = 10**12
"""The upper bound of numbers that have no other: more than any run needs, and far below where arithmetic overflows."""


class Needs(NamedTuple):
    """The option without which another one has no effect: ``path`` must have one of ``values``.

    Without ``values`` it must be switched on: anything but null, false, 0 and empty.
    """

    path: str
    values: tuple[str | int, ...] = ()

    def met(self, value: Any) -> bool:
        """Whether the option has its effect where the one at ``path`` has this value."""
        return value in self.values if self.values else bool(value)


def option(
    documentation: str,
    default: Any = MISSING,
    *,
    change: Change = "never",
    needs: Needs | None = None,
    path: bool = False,
    default_factory: Callable[[], Any] | None = None,
    **bounds: Any,
) -> Any:
    """One option. Unless ``needs`` is met it has no effect, and a value other than the default is an error.

    Args:
        path: the value is the path of a file or directory, or an address.
    """
    if default_factory is not None:
        bounds["default_factory"] = default_factory
    elif default is not MISSING:
        bounds["default"] = default
    if bounds.keys() & {"gt", "ge"} and not bounds.keys() & {"lt", "le"}:
        bounds["le"] = LARGEST
    facts: Any = {"change": change, "needs": needs, "path": path}
    return Field(description=documentation, json_schema_extra=facts, **bounds)


def change_of(field: FieldInfo) -> Change:
    """How the option may change."""
    return field.json_schema_extra["change"]  # type: ignore[index,call-overload,return-value]


def needs_of(field: FieldInfo) -> Needs | None:
    """What the option needs to have an effect."""
    return field.json_schema_extra["needs"]  # type: ignore[index,call-overload,return-value]


def is_path(field: FieldInfo) -> bool:
    """Whether the option is a path."""
    return field.json_schema_extra["path"]  # type: ignore[index,call-overload,return-value]
