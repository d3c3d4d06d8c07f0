import re
import time
from collections.abc import Iterator

import pytest

from tests.cluster import NODES, SCRIPT, run


@pytest.fixture
def nodes_come_back(slurm_cluster: dict[str, str]) -> Iterator[dict[str, str]]:
    """The cluster; after the test all its nodes are started again."""
    yield slurm_cluster
    until = time.monotonic() + 60
    while run([SCRIPT, "status"], 20, slurm_cluster).returncode:
        assert time.monotonic() < until, "the nodes are not up again"
        for number in range(1, NODES + 1):
            shown = run(["scontrol", "show", "node", f"node{number}", "-o"], 20, slurm_cluster).stdout
            if re.search(r"State=\S*(DOWN|NOT_RESPONDING|\*)", shown):
                run([SCRIPT, "start-node", f"node{number}"], 20, slurm_cluster)
                run(["scontrol", "update", f"NodeName=node{number}", "State=RESUME"], 20, slurm_cluster)
        time.sleep(1)
