"""The house rules that a reader relies on: who imports whom, and how long a file may get."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("mythos", "launch", "data_prep") for path in sorted((ROOT / package).rglob("*.py"))]
LAYERS = [
    ("mythos.errors", "mythos.files"),
    ("mythos.config",),
    ("mythos.loss", "mythos.model"),
    ("mythos.data",),
    ("mythos.plan",),
    ("mythos.run",),
    ("mythos.ranks",),
    ("mythos.engine",),
    ("mythos.checkpoint",),
    ("mythos.eval",),
    ("mythos.train",),
    ("mythos.export",),
    ("data_prep",),
    ("launch",),
]
"""From the bottom up: a module imports from its own layer and those below."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    return None


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_downward(path: Path) -> None:
    own = layer(module_name(path))
    if own is None:
        assert module_name(path) == "mythos"
        return
    upward = {name for name in imports(path) if (layer(name) or 0) > own}
    assert not upward


def test_deepspeed_has_one_border() -> None:
    users = {module_name(path) for path in SOURCES if any(name.split(".")[0] == "deepspeed" for name in imports(path))}
    assert users == {"mythos.engine.engine"}


def test_configuration_and_planner_need_no_torch() -> None:
    for path in (*(ROOT / "mythos" / "config").glob("*.py"), *(ROOT / "mythos" / "plan").glob("*.py")):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 330
