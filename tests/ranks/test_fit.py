"""The plan of a run on the devices that its ranks found, and the warning where it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.plan.cluster import cluster_of_device
from mythos.plan.plan import make_plan
from mythos.ranks.fit import memory_warning, plan_of_ranks
from tests.tiny import tiny_config

GIB = 2**30


def test_the_plan_is_of_the_ranks_and_the_memory_of_this_machine(tmp_path: Path) -> None:
    config = tiny_config("looped-moe", tmp_path, tmp_path, ranks=4, train__micro_batch_sequences=2)
    found = plan_of_ranks(config, ["a", "a", "b", "b"], torch.device("cpu"))
    assert found is not None
    assert (found.layout.ranks, found.layout.nodes, found.layout.expert_parallel_size) == (4, 2, 2)
    assert memory_warning(found) is None


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        (
            {"parallel__zero_stage": 1, "loop__recompute": False},
            "a smaller train.micro_batch_sequences, loop.recompute",
        ),
        ({"parallel__zero_stage": 3, "train__micro_batch_sequences": 1}, "try more ranks"),
        ({"parallel__zero_stage": 2}, "parallel.zero_stage=3, more ranks"),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_would(options: dict[str, Any], remedies: str, tmp_path: Path) -> None:
    config = tiny_config("looped", tmp_path, tmp_path, ranks=2, **options)
    cluster = cluster_of_device("NVIDIA H100 80GB HBM3", 4.001 * GIB, 2)
    assert cluster is not None
    warning = memory_warning(make_plan(config, 2, cluster))
    assert warning is not None
    assert "on each device, which has 1.02 MiB for it" in warning
    assert remedies in warning


def test_an_unknown_device_has_no_plan() -> None:
    assert cluster_of_device("a new GPU", GIB, 8) is None
