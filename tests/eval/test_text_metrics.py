"""What `mythos eval` measures of text: the trainer's losses, on any ranks and in any batches, in two kinds of files."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.checkpoint.layout import find
from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.data.open import read_tokenizer
from mythos.eval.documents import bytes_in_rows
from mythos.eval.evaluate import open_evaluator
from mythos.eval.measure import Metrics, Wanted, text_metrics
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.cluster import REPO
from tests.eval.conftest import SEQUENCE_LENGTH, text_config
from tests.spawn import RankPool

DEPTHS = [1, 3, 5]


def evaluate(config: Config, wanted: Wanted) -> Metrics:
    with open_evaluator(config, torch.device("cpu"), wanted) as evaluator:
        return evaluator.measure(find(Path(config.run.directory), None))


def test_they_are_the_trainers_on_any_ranks_and_in_any_batches(
    text_run: Path, text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    text_run = Path(shutil.copytree(text_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))
    trained = next(line for line in reversed(read_metrics(text_run)) if "val/loss" in line)
    measured: list[Metrics] = []
    for pool, micro_batch in ((one_rank, 8), (one_rank, 3), (two_ranks, 1), (four_ranks, 2)):
        batch = {"train__micro_batch_sequences": micro_batch, "train__global_batch_sequences": micro_batch * pool.ranks}
        config = text_config(text_data, text_run, pool.ranks, eval__depths=DEPTHS, **batch)
        measured += pool.run(evaluate, config, Wanted(documents=None))
    for metrics in measured:
        assert metrics == pytest.approx(measured[0], rel=1e-6)
        assert metrics["val/loss"] == pytest.approx(trained["val/loss"], rel=1e-6)
    kinds = [f"{kind}_{name}" for kind in ("rows", "documents") for name in ("loss", "perplexity", "bits_per_byte")]
    expected = {f"eval/{kind}_depth_{steps}" for kind in kinds for steps in DEPTHS}
    assert {name for name in measured[0] if name.startswith("eval/")} == expected
    documented = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert all(f"| `eval/{kind}_depth_T` |" in documented for kind in kinds)
    assert measured[0]["eval/rows_perplexity_depth_3"] == pytest.approx(math.exp(trained["val/loss"]), rel=1e-6)
    dataset, tokenizer = TokenDataset(text_data, "validation"), read_tokenizer(text_data / "tokenizer.json")
    bits = trained["val/loss"] * len(dataset) * SEQUENCE_LENGTH / math.log(2)
    bits_per_byte = bits / bytes_in_rows(dataset, np.arange(len(dataset)), tokenizer)
    assert measured[0]["eval/rows_bits_per_byte_depth_3"] == pytest.approx(bits_per_byte, rel=1e-6)

    directory = RunDirectory(text_run)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in directory.evaluations.glob("*.json")]
    assert len(results) == 4
    for result in results:
        assert {name: result[name] for name in measured[0]} == pytest.approx(measured[0], rel=1e-6)
    for path in directory.evaluations.glob("*.json"):
        items = np.load(path.with_suffix(".npz"))
        assert len(set(items["documents"].tolist())) == len(items["documents"])
        for steps in DEPTHS:
            nats = items[f"documents_nats_depth_{steps}"].sum()
            loss = measured[0][f"eval/documents_loss_depth_{steps}"]
            assert nats / items["documents_tokens"].sum() == pytest.approx(loss, rel=1e-6)
            bits = measured[0][f"eval/documents_bits_per_byte_depth_{steps}"]
            assert nats / math.log(2) / items["documents_bytes"].sum() == pytest.approx(bits, rel=1e-6)
    events = EventAccumulator(str(directory.evaluations))
    events.Reload()
    assert set(events.Tags()["scalars"]) == expected | {"eval/rows_bits_per_byte"}
    loss = pytest.approx(measured[0]["eval/documents_loss_depth_1"], rel=1e-6)
    assert [(point.step, point.value) for point in events.Scalars("eval/documents_loss_depth_1")] == 4 * [(4, loss)]


def test_sources_have_metrics_of_their_own_and_the_mixture_is_their_mean(
    text_run: Path, text_data: Path, one_rank: RankPool
) -> None:
    sources = {"a": {"directory": str(text_data), "weight": 3.0}, "b": {"directory": str(text_data), "weight": 1.0}}
    config = text_config(text_data, text_run, data__directory=None, data__sources=sources)
    (metrics,) = one_rank.run(evaluate, config, Wanted(documents=5))
    for name in ("rows_loss", "documents_bits_per_byte"):
        a, b = (metrics[f"eval/{source}/{name}_depth_3"] for source in "ab")
        assert metrics[f"eval/{name}_depth_3"] == pytest.approx(0.75 * a + 0.25 * b)


def test_without_a_readable_tokenizer_there_are_losses_of_rows_alone(
    tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.data.conftest import open_run_data
    from tests.tiny import tiny_config

    data = open_run_data(tiny_config("dense", tiny_data, tiny_data))
    found, items = text_metrics(lambda asked: [], data, {"val/loss": 2.0}, [None], None, Wanted())
    assert found == {"eval/rows_loss": 2.0, "eval/rows_perplexity": math.exp(2.0)}
    assert not items
