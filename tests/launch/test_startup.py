"""The command line starts fast: nothing heavy is imported before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import REPO, clean_environment

MODEL, RUN = "configs/model/tiny-looped-moe.yaml", "configs/run/demo.yaml"
MAIN = "import resource, sys; from launch.cli import main; code = main(sys.argv[1:]); "
REPORT = (
    "found = {name.partition('.')[0] for name in sys.modules}; usage = resource.getrusage(resource.RUSAGE_SELF); "
    "print(*sorted(found), file=sys.stderr); print(usage.ru_utime + usage.ru_stime, file=sys.stderr); sys.exit(code)"
)
HEAVY = {"torch", "deepspeed", "pyarrow", "tokenizers", "streaming", "safetensors", "tensorboard", "rich"}
NOT_FOR_HELP = HEAVY | {"numpy", "omegaconf"}
START_UP_S = 0.5


def start(*words: str) -> tuple[int, set[str], float]:
    """Exit code, the modules that were imported, and the CPU time in seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN + REPORT, *words],
        capture_output=True,
        encoding="utf-8",
        env=clean_environment(),
        cwd=REPO,
        timeout=100,
        check=False,
    )
    names, cpu_s = done.stderr.splitlines()[-2:]
    return done.returncode, set(names.split()), float(cpu_s)


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--no-such-option"], 2),
        (["config", MODEL, RUN, "train.stepz=3"], 2),
        (["train", MODEL, RUN, "train.stepz=3"], 2),
    ],
    ids=["help", "help of a command", "unknown argument", "config", "train"],
)
def test_help_and_mistakes_take_less_than_half_a_second(words: list[str], exit_code: int) -> None:
    fastest_s = START_UP_S
    for _ in range(10):  # the machine may be busy with other tests
        code, modules, cpu_s = start(*words)
        assert code == exit_code
        assert not modules & (HEAVY | {"numpy"} if exit_code else NOT_FOR_HELP)
        fastest_s = min(fastest_s, cpu_s)
        if fastest_s < START_UP_S:
            break
    assert fastest_s < START_UP_S


@pytest.mark.parametrize(
    "words",
    [
        ["config", MODEL, RUN, "--ranks", "2"],
        ["params", MODEL],
        ["plan", MODEL, RUN, "--cluster", "cpu"],
        ["job", MODEL, RUN, "--nodes", "1", "--tasks-per-node", "2"],
    ],
    ids=lambda words: words[0],
)
def test_commands_about_a_configuration_import_no_torch(words: list[str]) -> None:
    code, modules, _ = start(*words)
    assert code == 0
    assert not modules & HEAVY


def test_status_and_checkpoint_list_import_no_torch(tmp_path: Path) -> None:
    for words in (["status", str(tmp_path)], ["checkpoint", "list", str(tmp_path)]):
        code, modules, _ = start(*words)
        assert code == 2, "there is no run in the directory"
        assert not modules & HEAVY
