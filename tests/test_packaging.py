"""pyproject.toml declares what the code imports, and constraints.txt pins exactly what that needs."""

import ast
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster import REPO
from tests.require import missing

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
PACKAGES = ("mythos", "launch", "data_prep")
NEVER_IMPORTED = {"mosaicml-streaming"}
"""Used through the format that it defines."""


def pinned() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): wanted for name, wanted in (line.split("==") for line in lines)}


def imported() -> set[str]:
    """The distributions that the installed packages import."""
    providers = packages_distributions()
    found = set()
    for path in [path for package in PACKAGES for path in (REPO / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - set(PACKAGES):
                found |= {canonicalize_name(provider) for provider in providers.get(name, [name])}
    return found


def closure(requirements: list[Requirement]) -> set[str]:
    """The names of the requirements and of everything that the installed packages require in turn."""
    found: set[str] = set()
    visited: set[tuple[str, frozenset[str]]] = set()
    pending = [(canonicalize_name(requirement.name), frozenset(requirement.extras)) for requirement in requirements]
    while pending:
        name, extras = pending.pop()
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        found.add(name)
        for requirement in map(Requirement, requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def test_imports_are_declared_and_declared_packages_are_imported() -> None:
    optional = [Requirement(line) for line in PROJECT["optional-dependencies"]["eval"]]  # imported where it is used
    declared = {canonicalize_name(requirement.name) for requirement in REQUIRED + optional}
    # pydantic-core belongs to pydantic; transformers is imported by code that is only copied into exports
    assert imported() - {"pydantic-core", "transformers"} == declared - NEVER_IMPORTED


def test_pinned_versions_are_in_the_declared_ranges() -> None:
    versions = pinned()
    for requirement in REQUIRED + EXTRAS:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_pytorch_of_a_container_is_accepted() -> None:
    (torch,) = (requirement for requirement in REQUIRED if requirement.name == "torch")
    accepted = {
        version: torch.specifier.contains(version, prereleases=True)  # as pip judges what is installed
        for version in ("2.10.0", "2.11.0a0+5228986c39.nv26.1", "2.14.0a0+git1234", "2.15.0a0", "2.15.0")
    }
    assert list(accepted.values()) == [False, True, True, False, False], accepted


def test_constraints_are_what_the_dependencies_need_and_nothing_else() -> None:
    versions = pinned()
    try:
        installed = {name: version(name) for name in versions}
    except PackageNotFoundError as error:
        missing(f"this environment was not installed with constraints.txt: no {error.name}")
    if installed != versions:
        missing("this environment was not installed with constraints.txt: other versions")
    assert set(versions) == closure(REQUIRED + EXTRAS)


def test_constraints_are_sorted() -> None:
    names = [
        line.partition("==")[0] for line in Path(REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert names == sorted(names, key=str.lower)
