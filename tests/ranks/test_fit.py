"""The plan of a run on the devices that its ranks found, and the warning where it does not fit."""

from pathlib import Path
from typing import Any

import pytest

from mythos.plan.cluster import cluster_of_device
from mythos.plan.plan import make_plan
from mythos.ranks.fit import Device, memory_warning, plan_of_ranks, recomputation_choice, recomputes_on
from tests.tiny import tiny_config

GIB = 2**30


def test_the_plan_is_of_the_ranks_and_the_memory_of_this_machine(tmp_path: Path) -> None:
    config = tiny_config("looped-moe", tmp_path, tmp_path, ranks=4, train__micro_batch_sequences=2)
    found = plan_of_ranks(config, ["a", "a", "b", "b"], [Device("cpu", 16 * GIB)] * 4)
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


def test_all_ranks_recompute_where_the_activations_do_not_fit_the_smallest_device(tmp_path: Path) -> None:
    config = tiny_config("looped", tmp_path, tmp_path, ranks=2, loop__recompute="auto")
    h100, hosts = "NVIDIA H100 80GB HBM3", ["a", "b"]
    large, small = Device(h100, 80 * GIB), Device(h100, 4 * GIB + 2**20)
    assert not recomputes_on(config, hosts, [large, large])
    assert recomputes_on(config, hosts, [large, small])
    assert recomputes_on(config, hosts, [Device("a new GPU", 80 * GIB)] * 2), "what fits it is not known"
    for devices, choice in (([large, large], "nothing is recomputed"), ([small, large], "loop steps are recomputed")):
        plan = plan_of_ranks(config, hosts, devices)
        assert plan is not None
        line = recomputation_choice(plan)
        assert line is not None
        assert line.startswith(f"loop.recompute=auto: {choice}: ")
        assert plan.to_json()["recompute"] == plan.recompute == recomputes_on(config, hosts, devices)


@pytest.mark.parametrize("asked", [True, False])
def test_recomputation_that_is_asked_for_does_not_depend_on_the_device(asked: bool, tmp_path: Path) -> None:
    config = tiny_config("looped", tmp_path, tmp_path, loop__recompute=asked)
    for name, size in (("NVIDIA H100 80GB HBM3", 4 * GIB), ("NVIDIA H100 80GB HBM3", 80 * GIB), ("a new GPU", GIB)):
        assert recomputes_on(config, ["a"], [Device(name, size)]) is asked


def test_an_unknown_device_has_no_plan() -> None:
    assert cluster_of_device("a new GPU", GIB, 8) is None
