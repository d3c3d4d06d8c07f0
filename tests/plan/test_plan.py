"""`mythos plan`: the published table, the formulas against closed forms, and the command."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from mythos.config.load import load, load_model
from mythos.config.schema import Config
from mythos.hardware import BF16_PEAKS
from mythos.model.attention import GroupedQueryAttention, LatentAttention, build_attention
from mythos.model.depth import draw_depths
from mythos.plan.cache import cache_bytes, cached_channels
from mythos.plan.cluster import DIRECTORY, Cluster, load_cluster
from mythos.plan.communication import Collective
from mythos.plan.cost import best_interval, goodput
from mythos.plan.layout import Group, Layout
from mythos.plan.plan import Plan, make_plan
from mythos.plan.search import search
from mythos.plan.speed import expected_loops, seconds
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = str(CONFIGS / "run" / "pretrain.yaml")
PUBLISHED_GFLOP = {"transformer-770m": 2.94, "looped-770m": 6.89, "transformer-1.3b": 5.29, "looped-1.3b": 12.57}
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def model(name: str) -> str:
    return str(CONFIGS / "model" / f"{name}.yaml")


def plan(name: str, ranks: int = 16, cluster: str = "h100", **options: Any) -> Plan:
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in options.items()]
    return make_plan(load([model(name), RUN], overrides, ranks), ranks, load_cluster(cluster))


@pytest.mark.parametrize("name", PUBLISHED_GFLOP)
def test_training_flops_are_the_published_ones(name: str) -> None:
    assert plan(name).to_json()["training_flops_per_token"] / 1e9 == pytest.approx(PUBLISHED_GFLOP[name], rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_plan_that_is_json(name: str) -> None:
    found = json.loads(json.dumps(plan(name).to_json(), allow_nan=False))
    assert found["parameters"]["total"] == plan(name).parameters.total
    assert found["step_seconds"] > 0
    assert 0 < found["mfu"] < 1


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_figure_of_a_cluster_has_a_sane_value_and_its_source(path: Path) -> None:
    cluster = load_cluster(path.stem)
    assert cluster.inside.bandwidth >= cluster.between.bandwidth
    known = [BF16_PEAKS[device] for device in cluster.devices if device in BF16_PEAKS]
    assert known == [cluster.peak("bf16")] * len(known), "those of perf/mfu"
    assert cluster.peak("bf16") / cluster.memory_bandwidth < 1000
    text = path.read_text(encoding="utf-8")
    assert "# Source" in text
    for line in text.splitlines():  # what the named data sheet does not say has a comment of its own
        if re.match(r"(dollars|gpu_hours|product_share|kernel_start|memory_gib)", line):
            assert "#" in line, line


def test_the_executed_loop_steps_are_the_mean_of_the_deepest_sequences_drawn() -> None:
    config = tiny_config("looped", Path("data"), Path("run"), loop__mean_depth=8, loop__stratified=False)
    loops = expected_loops(config, Layout(ranks=2, ranks_per_node=2))
    assert config.loop is not None
    depths = draw_depths(config.loop, 1, 1, range(16 * 4000)).reshape(4000, 16)
    assert loops.executed == pytest.approx(depths.max(axis=1).mean(), rel=0.01)
    assert loops.mean == pytest.approx(depths.mean(), rel=0.01)
    assert loops.executed_with_grad == pytest.approx(np.minimum(depths, 2).max(axis=1).mean(), rel=0.001)


@pytest.mark.parametrize("name", ["looped-770m", "looped-moe-770m", "transformer-140m"])
def test_the_cache_holds_what_the_attention_layers_keep(name: str) -> None:
    config = load_model([model(name)])
    layer = build_attention(config.width, config.attention, value_gate=False)
    assert isinstance(layer, GroupedQueryAttention | LatentAttention)
    assert cached_channels(config.attention) == layer.cached_channels
    depth = 8
    layers = config.layers if config.kind == "dense" else 6 + 6 * depth + 6
    assert cache_bytes(config, depth, 100, 2) == layers * 128 * layer.cached_channels * 2


def test_collectives_take_latency_and_the_bytes_over_the_slowest_link() -> None:
    cluster = load_cluster("h100")
    inside = Collective("weights", "all_gather", Group(8, 8), calls=2, bytes=8e9)
    expected = 2 * 3 * 12e-6 + 7e9 / (450e9 * 0.75)
    assert seconds(inside, cluster) == pytest.approx(expected)
    across = Collective("experts", "all_to_all", Group(16, 8), calls=1, bytes=16e9)
    assert seconds(across, cluster) == pytest.approx(3 * 12e-6 + 20e-6 + 8e9 / (50e9 * 0.85))
    reduced = Collective("gradients", "all_reduce", Group(2, 2), calls=1, bytes=1e9)
    assert seconds(reduced, cluster) == pytest.approx(12e-6 + 2 * 0.5e9 / (450e9 * 0.75))


def test_the_best_interval_has_the_best_goodput() -> None:
    stall, failures = 30.0, 8 * 3600.0
    best = best_interval(stall, failures)
    assert best == pytest.approx(math.sqrt(2 * stall * failures), rel=0.05)
    shares = {interval: goodput(interval, stall, failures, 0.0) for interval in np.linspace(200, 5000, 500)}
    assert max(shares, key=lambda interval: shares[interval]) == pytest.approx(best, rel=0.05)


def test_larger_layouts_need_less_memory_and_recomputation_too() -> None:
    peaks = [plan("looped-1.3b", parallel__zero_stage=stage).memory.peak for stage in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    with_recomputation = plan("looped-1.3b")
    assert with_recomputation.peak_with_recomputation < with_recomputation.peak_without_recomputation
    assert plan("looped-1.3b", loop__recompute="false").memory.peak == with_recomputation.peak_without_recomputation


def test_the_search_ranks_what_fits() -> None:
    config = load([model("mythos-3b"), RUN], ["train.micro_batch_sequences=1"], 1)
    cluster = load_cluster("h100")
    by_time, by_cost = (search(config, cluster, [1, 2, 4], by) for by in ("time", "cost"))  # type: ignore[arg-type]
    assert all(each.fits for each in by_time.fitting)
    days = [each.cost.days for each in by_time.fitting]
    assert days == sorted(days)
    dollars = [each.cost.dollars for each in by_cost.fitting]
    assert dollars == sorted(dollars)
    assert {each.layout.nodes for each in by_time.fitting} == {1, 2, 4}
    small = load_cluster("h100", ["cluster.memory_gib=6"])
    assert search(config, small, [1], "time").least_memory is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    files = [model("looped-moe-770m"), RUN]
    assert main(["plan", *files, "--nodes", "2", "--json", str(output), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert "across 2 nodes" in printed
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["gpus"] == 16
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", *files, "--nodes", "2", "--search", "--top", "3", "--by", "cost"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["plan", "--compare", model("looped-770m"), model("looped-moe-770m"), "--nodes", "2"]) == 0
    rows = dict(re.match(r"(.+?) {2,}(.+)", line).groups() for line in capsys.readouterr().out.splitlines())  # type: ignore[union-attr]
    assert rows["attention"].split() == ["gqa", "mla"]
    assert rows["parameters"].split() == ["776,655,680", "777,904,640"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "h1000"], "--cluster h1000: there is no such file"),
        (["cluster.memory=1"], "cluster.memory=1: a cluster has no such figure"),
        (["--compare"], "--compare: give two models"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json: there is no directory /nowhere: create it"),
        (["--nodes", "3"], "must be a multiple of train.micro_batch_sequences"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [model("looped-770m")] if "--compare" in arguments else [model("looped-770m"), RUN]
    assert main(["plan", *files, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_bench_measures_is_a_cluster(tmp_path: Path) -> None:
    collectives = [
        {"kind": "all-gather", "bytes": size, "seconds": time, "bus_bytes_per_second": size / 2 / time}
        for size, time in ((4096, 1e-4), (1 << 24, 0.01))
    ]
    peaks = {
        "matmul": [{"dtype": "fp32", "size": 1024, "flops_per_second": 2e11}],
        "copies": [{"kind": "on the device", "bytes": 1, "bytes_per_second": 8e9}],
        "collectives": collectives,
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"device": "a CPU", "ranks": 2, "peaks": peaks}), encoding="utf-8")
    cluster = load_cluster(str(path))
    assert isinstance(cluster, Cluster)
    assert (cluster.gpus_per_node, cluster.peak("fp32"), cluster.memory_bandwidth) == (2, 1e11, 8e9)
    assert cluster.inside.bandwidth == pytest.approx((1 << 24) / 2 / 0.01)
    assert cluster.inside.latency_s == pytest.approx(1e-4)


def test_the_demo_on_a_cpu() -> None:
    config: Config = load([model("tiny-looped-moe"), str(CONFIGS / "run" / "demo.yaml")], [], 2)
    found = make_plan(config, 2, load_cluster("cpu"))
    assert found.fits
    assert found.precision == "fp32"
