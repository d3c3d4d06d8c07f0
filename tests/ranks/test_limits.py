"""A run whose user may start no further thread or process ends with one line, and never hangs."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mythos.config.load import to_dict
from mythos.errors import BAD_INPUT, FAILED
from mythos.run.metrics import read_metrics
from tests.cluster import REPO, clean_environment
from tests.faults.supervise import configuration
from tests.require import missing
from tests.spawn import environments

USER = 54_321
"""The kernel counts the processes and threads of each user, and limits nothing for root."""
CAPABILITIES = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
PROGRAM = """
import resource, sys
from launch.cli import main
from mythos.train.report import Report

step = Report.step

def step_with_limit(*arguments):
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    return step(*arguments)

if sys.argv.pop(1) == "after the first step":
    Report.step = step_with_limit
sys.exit(main(sys.argv[1:]))
"""


pytestmark = pytest.mark.slow


@pytest.fixture
def ranks(tiny_data: Path, tmp_path: Path) -> Iterator[Callable[[int, str], list[subprocess.Popen[str]]]]:
    """Starts a run of two ranks as another user, with a limit of threads."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        missing("only root can start a process as another user, with setpriv")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(configuration(tiny_data, tmp_path, train__steps=10_000))), encoding="utf-8")
    command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *CAPABILITIES]
    started: list[subprocess.Popen[str]] = []

    def start(limit: int, when: str) -> list[subprocess.Popen[str]]:
        started.extend(
            subprocess.Popen(
                [*command, sys.executable, "-c", PROGRAM, when, "train", str(file)],
                env=clean_environment() | environ,
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit)),
            )
            for environ in environments(2)
        )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_may_not_start_its_threads_is_refused(
    ranks: Callable[[int, str], list[subprocess.Popen[str]]],
) -> None:
    processes = ranks(8, "at the start")
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [BAD_INPUT, BAD_INPUT]
    assert "Traceback" not in "".join(outputs)
    assert "a rank needs up to 32 threads, and one could not be started (" in outputs[0]


def test_a_run_ends_although_it_may_start_no_further_thread(
    ranks: Callable[[int, str], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    processes = ranks(500, "after the first step")
    until = time.monotonic() + 100
    while not any("train/loss" in line for line in read_metrics(tmp_path / "run")):
        assert time.monotonic() < until
        time.sleep(0.1)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == FAILED, output
    assert f"rank 1 on {socket.gethostname()} (process {processes[1].pid}) died" in output
