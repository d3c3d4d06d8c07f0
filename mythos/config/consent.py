"""Which options may differ when a run is resumed, and what the user has accepted with ``--accept``.

``--accept`` names an option, or a section for all options in it: ``optim.learning_rate``, ``optim``. It accepts only
what it names, so a requeued job, which has the same arguments, accepts no change that the user has not seen. Naming an
option that has not changed is not an error: after the first start with ``--accept``, nothing differs any more.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from mythos.config.option import Change, change_of
from mythos.config.tree import find, sections_in, similar
from mythos.errors import UserError


class Absent(Enum):
    """The value of an option in a tree that does not have it."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return self.value


ABSENT = Absent.ABSENT

Differences = Mapping[str, tuple[Any, Any]]
"""Dotted path -> (value before, value after)."""


def check_names(accept: Iterable[str]) -> None:
    """Check that every name is that of a section, or of an option that may change.

    Raises:
        UserError: a name is unknown, or that of an option that never changes.
    """
    for name in accept:
        field = find(name)
        if field is not None and change_of(field) == "never" and not sections_in(field.annotation):
            raise UserError(f"--accept {name}: a run keeps it: choose another run.directory")
        if field is None:
            close = similar(name)
            hint = f"did you mean {close}?" if close else "docs/configuration.md lists all options"
            raise UserError(f"--accept {name}: unknown option; {hint}")


def is_accepted(path: str, accept: Iterable[str]) -> bool:
    """Whether ``accept`` names this option or a section that it is in."""
    return any(f"{path}.".startswith(f"{name}.") for name in accept)


def arguments(paths: Iterable[str]) -> str:
    """The arguments that accept these changes."""
    return " ".join(f"--accept {path}" for path in paths)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every option in which two plain trees differ. A section that one tree does not have counts as empty."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name, ABSENT), after.get(name, ABSENT)
        sections = [{} if value is ABSENT else value for value in (old, new)]
        if all(isinstance(section, dict) for section in sections):
            found |= differences(sections[0], sections[1], f"{prefix}{name}.")
        elif old != new:
            found[prefix + name] = (old, new)
    return found


def is_new(path: str, change: tuple[Any, Any]) -> bool:
    """Whether an option did not exist before and is at its default: nobody has changed it."""
    field = find(path)
    return field is not None and change[0] is ABSENT and change[1] == field.default


def refusal(changed: Differences, accept: Sequence[str], rates: Differences, rate_jumps: bool) -> str | None:
    """Why a run cannot be resumed with these changes, and the remedy; None if it can be.

    Args:
        rates: the learning rate that follows from the changes, for the message.
        rate_jumps: options whose change is ``rate`` change it too much.
    """
    rules = {path: _rule(path, changed) for path in changed}
    never = [path for path, rule in rules.items() if rule == "never"]
    asking = ("ask", "rate") if rate_jumps else ("ask",)
    ask = [path for path, rule in rules.items() if rule in asking and not is_accepted(path, accept)]
    if not never and not ask:
        return None
    shown = {path: values for path, values in changed.items() if path in (*never, *ask)} | dict(rates)
    lines = [f"  {path}: {before!r} -> {after!r}" for path, (before, after) in shown.items()]
    if never:
        lines.append(f"Choose another run.directory: a run keeps its {', '.join(never)}")
    else:
        lines.append(f"Choose another run.directory, or accept the changes: {arguments(ask)}")
    return "\n".join(lines)


def _rule(path: str, changed: Differences) -> Change:
    """How this option may change: freely if it was removed, or is new with another kind or at its default."""
    field, (before, after) = find(path), changed[path]
    section = path.rpartition(".")[0]
    if _changes_sources(path, before, after):
        return "ask"
    if field is None or after is ABSENT:
        return "free"
    if is_new(path, changed[path]) or (before is ABSENT and f"{section}.kind" in changed):
        return "free"
    return change_of(field)


def _changes_sources(path: str, before: Any, after: Any) -> bool:
    """Whether a data set is added or removed: the data would ask about it a second time."""
    if path == "data.directory":
        return None in (before, after)
    return path.startswith("data.sources.") and ABSENT in (before, after)
