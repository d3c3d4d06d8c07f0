"""Rules for the code: which module imports which, how long files and functions are, how text files are opened."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mythos", "launch", "data_prep")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SCRIPTS = [path for package in ("benchmarks", "experiments") for path in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LAYERS = [
    ("mythos.errors", "mythos.files", "mythos.readers", "mythos.random_streams", "mythos.drawing"),
    ("mythos.config",),
    ("mythos.loss", "mythos.model"),
    ("mythos.data",),
    ("mythos.plan",),
    ("mythos.run",),
    ("mythos.network",),
    ("mythos.ranks",),
    ("mythos.hardware",),
    ("mythos.engine",),
    ("mythos.checkpoint",),
    ("mythos.eval",),
    ("mythos.train",),
    ("mythos.bench",),
    ("mythos.export",),
    ("mythos.inspect",),
    ("mythos.parity",),
    ("data_prep",),
    ("launch",),
]
"""From the bottom up: a module imports from its own layer and those below."""
WITHOUT_TORCH = (
    "mythos/errors.py",
    "mythos/files.py",
    "mythos/readers.py",
    "mythos/drawing.py",
    "mythos/config",
    "mythos/plan",
    "mythos/run",
    "mythos/network",
    "mythos/parity",
    "launch",
)
"""Files and packages that do not import torch when they are imported; a function may still import it."""
FILE_LINES, FUNCTION_LINES, ROOM_PERCENT, TRAIN_FILES = 300, 60, 16, 8
READING_LIST = (
    "launch/train.py",
    "mythos/train/loop.py",
    "mythos/train/step.py",
    "mythos/model/transformer.py",
    "mythos/model/loop.py",
)
"""From the command to the loss; the README names these five."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    """All modules that a file imports, at any depth."""
    return imported(ast.walk(tree(path)))


def imports_at_start(path: Path) -> set[str]:
    """The modules that are imported together with the file: not in functions, not for type checking alone."""
    nodes: list[ast.AST] = list(tree(path).body)
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return imported(iter(nodes))


def layer(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    return None


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    return module.split(".")[0]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_imports_go_downward() -> None:
    upward = []
    for path in SOURCES:
        own = layer(module_name(path))
        if own is None:
            assert module_name(path) == "mythos", f"{short(path)} belongs to no layer"
            continue
        upward += [f"{short(path)} imports {name}" for name in imports(path) if (layer(name) or 0) > own]
    assert not upward


def test_deepspeed_has_one_border() -> None:
    users = {module_name(path) for path in SOURCES if "deepspeed" in map(package_of, imports(path))}
    assert users == {"mythos.engine.engine", "mythos.engine.experts"}


def test_configuration_and_planner_need_no_torch() -> None:
    rooms = (ROOT / "mythos" / "config", ROOT / "mythos" / "plan")
    users = [short(path) for room in rooms for path in room.glob("*.py") if "torch" in map(package_of, imports(path))]
    assert not users


def test_commands_that_read_a_run_start_without_torch() -> None:
    """Neither these files nor what they import at their start may import torch."""
    places = [ROOT / name for name in WITHOUT_TORCH]
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.glob("*.py")))]
    by_name = {module_name(path): path for path in SOURCES}
    found, seen = [], set()
    waiting = [(path, short(path)) for path in files]
    while waiting:
        path, chain = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_at_start(path):
            if package_of(name) in ("torch", "deepspeed"):
                found.append(f"{chain} -> {name}")
            elif name in by_name:
                waiting.append((by_name[name], f"{chain} -> {short(by_name[name])}"))
    assert not found


def test_files_are_short() -> None:
    assert not [f"{short(path)}: {lines(path)} lines" for path in SOURCES + SCRIPTS + TESTS if lines(path) > FILE_LINES]


def test_functions_are_short() -> None:
    found = []
    for path in SOURCES + SCRIPTS + TESTS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                length = (node.end_lineno or first) - first + 1
                if length > FUNCTION_LINES:
                    found.append(f"{short(path)}: {node.name} has {length} lines")
    assert not found


def test_no_room_holds_too_much_of_the_code() -> None:
    rooms: Counter[str] = Counter()
    for path in (ROOT / "mythos").rglob("*.py"):
        rooms[path.relative_to(ROOT / "mythos").parts[0]] += lines(path)
    total = rooms.total()
    assert not [
        f"{room}: {count} of {total} lines" for room, count in rooms.items() if 100 * count > ROOM_PERCENT * total
    ]


def test_the_room_of_the_training_is_small() -> None:
    assert len(list((ROOT / "mythos" / "train").glob("*.py"))) <= TRAIN_FILES


def test_text_has_an_encoding() -> None:
    """The default is that of the locale."""
    found = []
    for path in SOURCES + SCRIPTS + TESTS:
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and opens_text(node)
                and "encoding" not in {word.arg for word in node.keywords}
            ):
                found.append(f"{short(path)}:{node.lineno}")
    assert not found


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a text file, open(FILE) or FILE.read_text() for example, or reads a program's output."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text", "FileHandler", "TextIOWrapper"):
        return True
    if {word.arg for word in call.keywords} & {"text", "universal_newlines"} and "subprocess" in ast.unparse(call.func):
        return True
    if name in ("TemporaryFile", "NamedTemporaryFile"):  # binary by default
        return any(isinstance(word.value, ast.Constant) and "b" not in str(word.value.value) for word in call.keywords)
    if name not in ("open", "fdopen") or ast.unparse(call.func) == "os.open":
        return False
    mode = call.args[:1] if isinstance(call.func, ast.Attribute) and name == "open" else call.args[1:2]
    mode += [word.value for word in call.keywords if word.arg == "mode"]
    if not mode:
        return True
    # An argument that is not a mode belongs to the open() of something else, such as a store of shards.
    text = mode[0].value if isinstance(mode[0], ast.Constant) else ""
    return isinstance(text, str) and set(text) <= set("rwxat+") and text != ""


def test_only_what_this_machine_lacks_is_skipped() -> None:
    """By tests/require.py, which makes the test fail in CI."""
    ways = {"skip", "skipif", "importorskip", "xfail"}
    for path in TESTS:
        if short(path) != "tests/require.py":
            names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
            assert not names & ways, f"{short(path)}: use missing() or require() of tests/require.py"


def test_the_readme_names_the_five_files_from_the_command_to_the_loss() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = [text.find(name) for name in READING_LIST]
    assert -1 not in places
    assert places == sorted(places), "in this order"


def test_the_five_files_form_a_chain() -> None:
    """Each imports the next, except that the step calls the model through the engine, and a model finds its loop."""
    for path, following in pairwise(READING_LIST):
        names = imports(ROOT / path)
        if path == "mythos/train/step.py":
            assert "mythos.engine.engine" in names
            assert "mythos.model" in imports(ROOT / "mythos/engine/engine.py")
            names = imports(ROOT / "mythos/model/__init__.py")
        assert module_name(ROOT / following) in names, f"{path} does not lead to {following}"
