"""What modules declare about their own parameters: initial values, stacked matrices, and the optimizer's treatment.

A module class that needs more than the defaults has the methods or the attribute of the protocols below. Initialisation
and optimizer collect them, so a new kind of layer changes neither.
"""

from collections.abc import Iterator
from enum import Enum, auto
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mythos.model.rules import Rule, Start


class Role(Enum):
    """How the optimizer treats a parameter."""

    BLOCK = auto()
    """In a transformer block. Its matrices map the residual stream, and are Muon's."""
    EXPERT = auto()
    """A routed expert's; ZeRO needs these in a parameter group of their own."""
    ROUTER = auto()
    TABLE = auto()
    """Rows that are looked up; without weight decay."""
    OTHER = auto()


@runtime_checkable
class HasInitialValues(Protocol):
    """A module with initial values of its own for some of its parameters."""

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The rules of these parameters."""
        ...


@runtime_checkable
class HasStackedMatrices(Protocol):
    """A module that stores several matrices as one parameter."""

    def stacked_matrices(self) -> dict[Tensor, int]:
        """How many matrices such a parameter stacks along its rows."""
        ...


@runtime_checkable
class HasRole(Protocol):
    """A module whose parameters, and those of the modules in it without a role, have this role."""

    parameter_role: Role


def initial_rules(model: nn.Module, start: Start) -> dict[Tensor, Rule]:
    """The rules of all modules that have their own."""
    rules: dict[Tensor, Rule] = {}
    for module in model.modules():
        if isinstance(module, HasInitialValues):
            rules |= module.initial_values(start)
    return rules


def stacked_matrices(model: nn.Module) -> dict[Tensor, int]:
    """How many matrices a parameter stacks along its rows, where that is more than one.

    Muon orthogonalises gate and up, and key and value, separately, however they are stored: AutoEP keeps the
    experts' gate and up as two parameters, and so do the published models.
    """
    stacked: dict[Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, HasStackedMatrices):
            stacked |= module.stacked_matrices()
    return stacked


def parameter_roles(model: nn.Module) -> dict[Tensor, Role]:
    """The role of every parameter, in the order of ``model.parameters()``: that of the innermost module with one."""
    roles: dict[Tensor, Role] = {}
    for parameter, role in _walk(model, Role.OTHER):
        roles.setdefault(parameter, role)  # a tied parameter has the role of its first module
    return roles


def _walk(module: nn.Module, role: Role) -> Iterator[tuple[nn.Parameter, Role]]:
    if isinstance(module, nn.Embedding):
        role = Role.TABLE
    elif isinstance(module, HasRole):
        role = module.parameter_role
    for parameter in module.parameters(recurse=False):
        yield parameter, role
    for child in module.children():
        yield from _walk(child, role)
