"""The checks of `make gpu-check`, as functions of the device: on a CPU they run at small sizes, as part of the suite.

``here(function, *arguments)`` calls ``function(device, *arguments)`` in a process group of one rank: on a GPU in this
process, on a CPU in a worker of the test suite. ``record`` collects figures for the report (tests/gpu/report.py).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.report import REPORT_VARIABLE, Figure, write_report
from tests.require import require_gpu
from tests.spawn import RankPool, environments

FIGURES = pytest.StashKey[list[Figure]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A check runs on both devices; one that is marked ``gpu`` has nothing to check on a CPU."""
    if "device" in metafunc.fixturenames:
        both = [] if metafunc.definition.get_closest_marker("gpu") else ["cpu"]
        metafunc.parametrize("device", [*both, pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu":
        return torch.device("cpu")
    require_gpu()
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def gpu_process() -> None:
    """This process is rank 0 of 1 on the GPU."""
    from mythos.ranks import group

    os.environ |= environments(1)[0]
    group.start("cuda")


@pytest.fixture
def here(device: torch.device, request: pytest.FixtureRequest) -> Callable[..., Any]:
    if device.type == "cpu":
        pool: RankPool = request.getfixturevalue("one_rank")
        return lambda function, *arguments: pool.run(function, device, *arguments)[0]
    request.getfixturevalue("gpu_process")
    return lambda function, *arguments: function(device, *arguments)


@pytest.fixture
def record(device: torch.device, request: pytest.FixtureRequest) -> Callable[[str, float, str], None]:
    """Add a figure of a GPU to the report: its name, its value and the criterion."""

    def add(name: str, value: float, criterion: str) -> None:
        if device.type == "cuda":
            check = request.node.originalname.removeprefix("test_").replace("_", " ")
            request.config.stash.setdefault(FIGURES, []).append(Figure(check, name, value, criterion))

    return add


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """The engines of one check leave no memory for the next."""
    yield
    if torch.cuda.is_available():
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get(REPORT_VARIABLE)
    if path and torch.cuda.is_available():
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        failed = [report.nodeid for report in reporter.stats.get("failed", [])]
        write_report(Path(path), session.config.stash.get(FIGURES, []), failed)
