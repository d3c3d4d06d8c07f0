import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share two cores

from collections.abc import Iterator
from pathlib import Path

import pytest

from mythos.run.console import log
from tests.cluster import slurm_cluster  # noqa: F401
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set for ``tiny_config``, shared by all tests: read only."""
    return write_data_set(tmp_path_factory.mktemp("data"), VOCABULARY)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    """A program that a test runs in this process sets up the logger, which the next test must not find so."""
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    for handler in [each for each in log.handlers if each not in handlers]:
        log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = propagate
