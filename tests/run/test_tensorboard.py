"""What TensorBoard itself makes of the files of a family of runs: HParams, layout, names of runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from mythos.eval.evaluate import tensorboard_points
from mythos.run.hparams import hparams
from mythos.run.metrics import MetricsWriter
from mythos.run.tensorboard import LAYOUT, CurvePosition, write_evaluation
from tests.tiny import tiny_config

LOSSES = {"looped/seed-1": 2.0, "looped-moe/seed-1": 1.5, "dense/seed-1": 3.0}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three kinds of models; one of them was resumed."""
    runs = tmp_path_factory.mktemp("runs")
    for name, loss in LOSSES.items():
        (runs / name).mkdir(parents=True)
        config = tiny_config(name.split("/")[0], runs, runs / name)
        writer = MetricsWriter(runs / name, CurvePosition())
        writer.write_config("seed: 1", hparams(config))
        writer.write(CurvePosition(0, 0, 0), {"val/loss": 9.0, "perf/mfu": 0.25, "perf/tokens_per_second": 100.0})
        writer.write(CurvePosition(1, 120, 3), {"val/loss": loss, "perf/mfu": 0.5})
        writer.write_picture("val/expert_load", 1, np.zeros((4, 4, 3), dtype=np.uint8))
        writer.close()
        write_evaluation(runs / name, 1, {"eval/rows_bits_per_byte": loss / 3, "eval/best_task": 0.5})
    return runs


@pytest.fixture(scope="module")
def provider(family: Path) -> MultiplexerDataProvider:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(family))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(family))


def test_runs_have_the_names_of_their_directories(provider: MultiplexerDataProvider) -> None:
    names = {run.run_name for run in provider.list_runs(RequestContext(), experiment_id="")}
    of_each = ("", "/by_tokens", "/by_gflop", "/evaluations")
    assert names == {f"{name}{part}" for name in LOSSES for part in of_each}


def test_hparams_are_a_dozen_numbers_with_the_metrics_that_matter(provider: MultiplexerDataProvider) -> None:
    context, request = backend_context.Context(base_plugin.TBContext(data_provider=provider)), RequestContext()
    metadata = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest(hparams_limit=50)).run()
    kinds = {info.name: info.type for info in metadata.hparam_infos}
    texts = {name for name, kind in kinds.items() if kind != api_pb2.DATA_TYPE_FLOAT64}
    assert texts == {"model", "optimizer"}
    assert 12 <= len(kinds) <= 13
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        col_params=[api_pb2.ColParams(metric=info.name) for info in metadata.metric_infos],
    )
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    assert {session.name for group in groups for session in group.sessions} == set(LOSSES)
    assert len(groups) == len(LOSSES), "each run has a row"
    rows = [(dict(group.hparams.items()), measured(group)) for group in groups]
    for values, metrics in rows:
        loss = metrics["val/loss"]
        assert metrics["eval/rows_bits_per_byte"] == pytest.approx(loss / 3)
        assert metrics["perf/mfu"] == 0.5
        assert metrics["eval/best_task"] == 0.5
        is_dense = values["model"].string_value == "dense"
        assert is_dense == (loss == LOSSES["dense/seed-1"])
        assert (values["mean depth"].number_value == 1.0) == is_dense
        assert (values["experts"].number_value > 0) == (loss == LOSSES["looped-moe/seed-1"])


def measured(group: Any) -> dict[str, float]:
    return {value.name.tag: value.value for value in group.metric_values}


def test_the_best_task_is_one_with_an_accuracy() -> None:
    tasks = {
        "arc_depth_8": {"acc,none": 0.4},
        "core_depth_8": {"accuracy": 0.3},
        "wikitext_depth_8": {"word_perplexity": 57},
    }
    tasks |= {"arc_depth_4": {"acc,none": 0.9}}
    metrics = {f"eval/{name}": float(next(iter(results.values()))) for name, results in tasks.items()}
    tasks |= {"group_without_a_mean_depth_8": {}}
    metrics |= {"val/loss": 1.0, "eval/rows_bits_per_byte_depth_4": 1.2, "eval/rows_bits_per_byte_depth_8": 1.1}
    points = tensorboard_points(metrics, tasks, 8)
    assert points["eval/best_task"] == 0.4
    assert points["eval/rows_bits_per_byte"] == 1.1
    assert "val/loss" not in points
    assert "eval/best_task" not in tensorboard_points({}, {}, None)


def test_the_charts_of_the_layout(family: Path, provider: MultiplexerDataProvider) -> None:
    context = base_plugin.TBContext(data_provider=provider, logdir=str(family))
    layout = json.loads(CustomScalarsPlugin(context).layout_impl(RequestContext(), ""))
    found = {category["title"]: [chart["title"] for chart in category["chart"]] for category in layout["category"]}
    assert found == {category: list(charts) for category, charts in LAYOUT.items()}
