"""The documents match the code: commands run, links resolve, names exist.

Fenced blocks of a document by their info string:

    bash      commands; run here, unless RUN_BY names the file that runs them, or the first line is "# on a cluster"
    console   commands after "$ ", each followed by exactly what it prints; run here
    python    a program; run here, after the document's commands
    yaml      valid YAML
    (none)    pictures and listings, no commands
"""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
import pytest
import yaml

from mythos.config.load import options
from tests.cluster import REPO, clean_environment, run

DOCUMENTS = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "docs").glob("parity-*/README.md")),
]
NEEDS_CLUSTER = "# on a cluster"
LIMIT_S = 400
FOLDERS = "mythos|launch|data_prep|benchmarks|experiments|configs|slurm|tests|docs|demo"
METRIC = r"(?:train|val|eval|depth|loop|moe|checkpoint|perf)/[A-Za-z_/]+"


class RunBy(NamedTuple):
    """Where a command is run instead: a file, and a part of it that shows so."""

    file: str
    shown_by: str


RUN_BY = {
    "make demo": RunBy("tests/test_demo.py", '["make", "demo"'),
    "make setup": RunBy("Makefile", "demo: setup"),
    'mythos generate runs/demo --prompt "My fellow citizens" --tokens 32': RunBy(
        "tests/eval/test_generate.py", "def test_a_text_is_printed_as_it_is_written"
    ),
    'mythos generate runs/demo --prompt "The state" --tokens 32 --depth 8 --top-p 0.9 --seed 3 eval.exit_change=0.1 '
    "device=cpu": RunBy("tests/eval/test_generate.py", "def test_a_text_is_printed_as_it_is_written"),
    "make lint": RunBy(".ci/run", "make lint"),
    "make test": RunBy(".ci/run", "make test"),
    "python -m pytest tests/faults": RunBy("Makefile", "TESTS_OF_FAULTS := tests/faults"),
    "mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml": RunBy(
        "tests/launch/test_train.py", "def test_a_bare_process_gives_the_curve_within_rounding"
    ),
    "torchrun --nproc-per-node=2 --no-python mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml": (
        RunBy("tests/launch/test_train.py", "def test_torchrun_gives_the_same_curve")
    ),
    "tensorboard --logdir runs": RunBy("tests/run/test_tensorboard.py", "AddRunsFromDirectory"),
    "mythos inspect runs/demo": RunBy("tests/test_demo.py", '"inspect", str(directory)'),
    "mythos inspect runs/demo --rows 8 device=cpu": RunBy("tests/test_demo.py", '"--rows", "8", "device=cpu"'),
    "mpiexec -n 2 mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml": RunBy(
        "Makefile", "mpiexec -n 2 $(BIN)/mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml"
    ),
}


class Block(NamedTuple):
    """A fenced block: its info string, and its text."""

    info: str
    text: str


def blocks(document: Path) -> list[Block]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(*match.groups()) for match in fence.finditer(document.read_text(encoding="utf-8"))]


def commands(block: Block) -> list[str]:
    """The commands of a bash block, each on one line, without comments, single spaces between the words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]
    return [line for line in found if line]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


def name_of(document: Path) -> str:
    return str(document.relative_to(REPO))


def slugs(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What a reader has: the repository, the environment of `make setup`, the run of `make demo`.

    To save time the text is a quarter of the demo's, and the run is a smaller one, of version 0.1.
    """
    for name, target in (("configs", REPO / "configs"), ("slurm", REPO / "slurm"), (".venv", Path(sys.prefix))):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "demo").mkdir()
    text = pyarrow.parquet.read_table(REPO / "demo/sotu.parquet")
    pyarrow.parquet.write_table(text.take(list(range(0, len(text), 4))), tmp_path / "demo/sotu.parquet")
    shutil.copytree(REPO / "tests/train/version_0_1/dense-adamw", tmp_path / "runs/demo")
    return tmp_path


def here(block: Block) -> list[str]:
    """The commands of a block that are run by this file."""
    if block.info != "bash" or block.text.startswith(NEEDS_CLUSTER):
        return []
    return [command for command in commands(block) if command not in RUN_BY]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(map(here, blocks(d)))], ids=name_of)
def test_the_commands_run(document: Path, workspace: Path) -> None:
    for script in filter(None, map(here, blocks(document))):
        done = run(["bash", "-exc", "\n".join(script)], LIMIT_S, cwd=workspace)
        assert done.returncode == 0, done.stderr
    for program in [block.text for block in blocks(document) if block.info == "python"]:
        done = run([sys.executable, "-c", program], LIMIT_S, cwd=workspace)
        assert done.returncode == 0, done.stderr
    documented = re.compile("|".join(f"(?:{name})" for name in documented_metrics()))
    for path in (workspace / "runs").glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not [name for name in json.loads(line) if name != "step" and not documented.fullmatch(name)], path


def test_printed_output_is_what_the_command_prints(workspace: Path) -> None:
    consoles = [block.text for document in DOCUMENTS for block in blocks(document) if block.info == "console"]
    shown = [part.partition("\n") for text in consoles for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    assert shown
    for command, _, output in shown:
        assert run(["bash", "-c", f"{command} 2>&1"], 60, cwd=workspace).stdout == output


@pytest.mark.parametrize(("command", "by"), RUN_BY.items())
def test_the_other_commands_are_run_where_it_says(command: str, by: RunBy) -> None:
    assert by.shown_by in (REPO / by.file).read_text(encoding="utf-8")
    assert any(command in commands(block) for document in DOCUMENTS for block in blocks(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_of_a_known_kind(document: Path) -> None:
    starts_command = re.compile(r"^(\$ |mythos |make |python|pip |srun |sbatch |mpiexec |torchrun |slurm/\w+\.sh )")
    for block in blocks(document):
        assert block.info in ("bash", "console", "python", "yaml", "")
        if block.info == "yaml":
            assert yaml.safe_load(block.text)
        if not block.info:
            assert not any(starts_command.match(line) for line in block.text.splitlines()), block.text


def mythos_calls(document: Path) -> Iterator[list[str]]:
    """The words after "mythos" of every call of it, those on a cluster and those in running text too."""
    texts = [command for block in blocks(document) if block.info == "bash" for command in commands(block)]
    for text in texts + inline_code(document):
        for call in re.findall(r"(?:^|[\s/])mythos ([a-z].*?)(?=$|[;&|])", text):
            yield shlex.split(call)


@pytest.fixture(scope="module")
def help_of() -> dict[tuple[str, ...], str]:
    """What `mythos ... --help` prints, by the names of the command, as far as it was asked for."""
    return {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_options_of_mythos_exist(document: Path, help_of: dict[tuple[str, ...], str]) -> None:
    environ = clean_environment() | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    for words in mythos_calls(document):
        names = tuple(words[: 2 if words[0] in ("checkpoint", "data", "parity", "scaling") else 1])
        if names not in help_of:
            done = run([sys.executable, "-m", "launch.cli", *names, "--help"], 60, environ)
            assert done.returncode == 0, f"mythos {' '.join(names)}: {done.stderr}"
            help_of[names] = done.stdout
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"(?<![\w-]){word.partition('=')[0]}(?![\w-])", help_of[names]), f"{names}: {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in slugs(file), f"{target}: no such heading"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=name_of)
def test_named_files_modules_and_options_exist(document: Path) -> None:
    in_blocks = [word for b in blocks(document) if b.info == "bash" for c in commands(b) for word in c.split()]
    made = {"demo/data"}
    for word in [word.strip("'\"") for code in inline_code(document) for word in code.split()] + in_blocks:
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./*{{}}-]*", word) and word not in made and "NAME" not in word:
            assert list(REPO.glob(word.rstrip("/"))), f"{word}: no such file"
        if re.fullmatch(r"(?:benchmarks|experiments)\.\w+", word):
            assert find_spec(word), f"{word}: no such module"
    sections = "|".join(sorted({path.partition(".")[0] for path in options() if "." in path}))
    for word in inline_code(document):
        path = word.partition("=")[0]
        if re.fullmatch(rf"(?:{sections})(?:\.[a-z_0-9]+)+", path) and not path.startswith("data.sources."):
            known = any(option == path or option.startswith(f"{path}.") for option in options())
            assert known or Path(path).suffix in (".py", ".md"), f"{path}: no such option"


def documented_metrics() -> set[str]:
    """The names in docs/metrics.md, as patterns: T is a depth and NAME a source."""
    names = re.findall(rf"^\| `({METRIC})` \|", (REPO / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name.replace("NAME", r"[\w-]+").replace("_T", r"_\d+") for name in names}


def written_metrics() -> set[str]:
    """The names of metrics that the code spells; those of validation and evaluation are put together."""
    constants = {
        node.value
        for path in (REPO / "mythos").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {name for name in constants if re.fullmatch(METRIC, name) and not name.startswith(("val/", "eval/"))}


def test_every_metric_is_documented_and_every_documented_one_is_written() -> None:
    documented = {name for name in documented_metrics() if not name.startswith(("val/", "eval/"))}
    assert written_metrics() == documented


def test_the_readme_is_short_and_names_the_five_files() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 165
    names = ("launch/train", "mythos/train/loop", "mythos/train/step", "mythos/model/transformer", "mythos/model/loop")
    assert [f"{name}.py" for name in names] == re.findall(r"\[[\w/]+\.py\]\(([\w/]+\.py)\)", text)
    assert os.access(REPO / "LICENSE", os.R_OK)
