"""A loss spike is reported; with train.spike_rewind the run returns to its checkpoint and skips the data since then."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import TrainingError
from mythos.ranks.preemption import StopRequest
from mythos.run.anomalies import FIRST_STEPS
from mythos.run.metrics import read_metrics
from mythos.train.loop import train
from tests.data.conftest import open_run_data
from tests.spawn import RankPool
from tests.tiny import tiny_config

STEPS, SPIKE, SAVED = FIRST_STEPS + 8, FIRST_STEPS + 5, FIRST_STEPS


def train_with_spikes(
    config: Config, calls_with_a_spike: list[int], stop_at: int | None = None, call_with_a_penalty: int | None = None
) -> tuple[str, list[list[list[int]]]]:
    """Exit code or error of the run, and the tokens that this rank was given at each training step."""
    plain, seen, stop = TrainingEngine.__call__, [], StopRequest()

    def call(engine: TrainingEngine, tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        output = plain(engine, tokens, *rest, **options)
        if torch.is_grad_enabled():
            seen.append(tokens.tolist())
            if len(seen) in calls_with_a_spike:
                output = output._replace(total=3 * output.total, cross_entropy=3 * output.cross_entropy)
            if len(seen) == call_with_a_penalty:
                output = output.plus({"train/z_loss": 2 * output.total})
            if len(seen) == stop_at:
                stop.signal_name = "a test"
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "__call__", call)
        try:
            return str(train(config, torch.device("cpu"), stop)), seen
        except TrainingError as error:
            return str(error), seen


def configuration(data: Path, run: Path, **options: Any) -> Config:
    return tiny_config(
        "looped", data, run, ranks=2, train__steps=STEPS, checkpoint__every=10, eval__every=1000, **options
    )


def test_a_spike_of_the_cross_entropy_is_reported_and_the_run_continues(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data, tmp_path / "run")
    ends = two_ranks.run(train_with_spikes, config, [SPIKE], None, SPIKE - 2)
    assert [how for how, _ in ends] == ["0", "0"]
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert log.count(f"WARNING step {SPIKE}: loss ") == log.count(" is a spike, ") == 1
    assert len(ends[0][1]) == STEPS


def test_a_rewound_run_skips_the_data_since_the_checkpoint(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data, tmp_path / "run", train__spike_rewind=True, checkpoint__mode="sync")
    ends = two_ranks.run(train_with_spikes, config, [SPIKE])
    assert [how for how, _ in ends] == ["0", "0"]
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text(encoding="utf-8")
    left_out = 8 * (SPIKE - SAVED)
    assert f"at step {SAVED}; the next {left_out} sequences are left out" in log

    stream = open_run_data(config).stream()
    # What steps SAVED + 1 to SPIKE consumed is skipped: the repeated steps use the sequences after it.
    expected = stream.rows(0, 8 * (SPIKE + STEPS - SAVED))[:, :-1].reshape(
        -1, 2, 4, 15
    )  # steps, ranks, sequences, tokens
    for rank, (_, seen) in enumerate(ends):
        assert seen == expected[:, rank].tolist()

    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "no step is recorded twice"
    assert [line["train/rewinds"] for line in lines] == [0.0] * SAVED + [1.0] * (STEPS - SAVED)

    losses = [line["train/loss"] for line in lines]
    assert max(losses[SAVED:]) < 1.1 * losses[SAVED - 1], "the spike does not affect the weights"


def test_too_many_spikes_end_the_run(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path / "run", train__spike_rewind=True, train__max_rewinds=1)
    ends = two_ranks.run(train_with_spikes, config, [SPIKE, SPIKE + 2])
    assert ends[0][0] == ends[1][0]
    assert "the loss has spiked again after 1 rewinds (train.max_rewinds); last checkpoint: " in ends[0][0]
    assert f"step_{SAVED:08d}" in ends[0][0]


def test_a_run_that_is_stopped_at_a_spike_rewinds_before_it_saves(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = {"train__spike_rewind": True, "checkpoint__mode": "sync"}
    straight = configuration(tiny_data, tmp_path / "straight", **options)
    expected = two_ranks.run(train_with_spikes, straight, [SPIKE])
    config = configuration(tiny_data, tmp_path / "run", **options)
    first = two_ranks.run(train_with_spikes, config, [SPIKE], SPIKE)
    assert [how for how, _ in first] == ["85", "85"]
    second = two_ranks.run(train_with_spikes, config, [])
    assert [how for how, _ in second] == ["0", "0"]
    for rank in range(2):
        assert first[rank][1] + second[rank][1] == expected[rank][1], "the same sequences, without those of the spike"
    lines, as_expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight")
    for name in ("train/loss", "train/rewinds", "train/tokens", "train/text_tokens"):
        found = [(line["step"], line[name]) for line in lines if name in line]
        assert found == [(line["step"], line[name]) for line in as_expected if name in line], name
