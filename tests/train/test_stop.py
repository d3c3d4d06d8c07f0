"""A run that receives a stop request at any time saves its state and resumes as if it had not been interrupted."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mythos.checkpoint import layout
from mythos.config.schema import Config
from mythos.data.format import BOS, Manifest
from mythos.engine.engine import TrainingEngine
from mythos.errors import DONE, PREEMPTED
from mythos.ranks.preemption import StopRequest
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from mythos.train.loop import train
from tests.faults.victim import sequences
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import record_training, run_some_steps, run_training

STEPS = 8
OPTIONS: dict[str, Any] = {
    "train__steps": STEPS,
    "eval__every": 3,
    "eval__depths": (1, 2, 3),
    "checkpoint__every": 100,
    "sample__tokens": 3,
}


def run_and_stop(config: Config, forward_pass: int, doing: str) -> int:
    """The run; rank 1 alone receives a stop request at a forward pass of that activity, counted from 1."""
    stop, call, calls = StopRequest(), TrainingEngine.__call__, 0

    def counted(engine: TrainingEngine, tokens: torch.Tensor, targets: Any, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        now = "training" if engine.module.training else "sampling" if targets is None else "validation"
        calls += now == doing
        if (now, calls, dist.get_rank()) == (doing, forward_pass, 1):
            stop.signal_name = "a test"
        return call(engine, tokens, targets, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "__call__", counted)
        return train(config, torch.device("cpu"), stop)


def metric(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(run) if name in line]


@pytest.fixture(scope="module")
def make(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Config]:
    """Configurations of one run, whose data has a tokenizer that can write a sample."""
    data = tmp_path_factory.mktemp("with_tokenizer") / "data"
    shutil.copytree(tiny_data, data)
    text = Tokenizer(WordLevel({BOS: 0}, unk_token=BOS)).to_str()
    (data / "tokenizer.json").write_text(text, encoding="utf-8")
    replace(Manifest.load(data), tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest()).save(data)
    return lambda run: tiny_config("looped", data, run, ranks=2, **OPTIONS)


@pytest.fixture(scope="module")
def uninterrupted(
    make: Callable[[Path], Config], two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert two_ranks.run(run_training, make(run)) == [DONE, DONE]
    return run


@pytest.mark.parametrize(
    ("doing", "forward_pass", "saved"),
    [
        ("validation", 1, None),  # before the first step
        ("validation", 4, 3),  # each validation has three forward passes, one per depth
        ("training", 6, 6),  # a validation is due after this step; the next start does it
        ("training", STEPS, STEPS),  # the last step
        ("validation", 11, STEPS),  # the last validation
    ],
)
def test_it_resumes_at_the_step_at_which_it_stopped(
    doing: str,
    forward_pass: int,
    saved: int | None,
    make: Callable[[Path], Config],
    uninterrupted: Path,
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    config, run = make(tmp_path / "run"), tmp_path / "run"
    assert two_ranks.run(run_and_stop, config, forward_pass, doing) == [PREEMPTED, PREEMPTED]
    newest = layout.latest(RunDirectory(run).checkpoints)
    assert (newest and layout.step_of(newest)) == saved
    assert read_status(run).state == "preempted"
    validated = [step for step, _ in metric(run, "val/loss_depth_3")]
    assert saved not in validated
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    for name in ("train/loss", "val/loss_depth_3", "train/tokens", "train/text_tokens"):
        assert metric(run, name) == metric(uninterrupted, name), name
    assert read_status(run).state == "finished"
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    assert "the run is finished at step 8" in (run / "log" / "rank_00000.log").read_text(encoding="utf-8")


def test_a_run_that_is_stopped_during_its_sample_is_finished(
    make: Callable[[Path], Config], uninterrupted: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    config, run = make(tmp_path / "run"), tmp_path / "run"
    assert two_ranks.run(run_and_stop, config, 2, "sampling") == [DONE, DONE]
    assert "no sample: stop requested" in (run / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert metric(run, "train/loss") == metric(uninterrupted, "train/loss")
    assert read_status(run).state == "finished"


def test_the_cost_of_saves_is_written_even_if_metrics_are_not_written_at_every_step(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = {"log__every": 10, "checkpoint__every": 3, "train__steps": 12}
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, **options)
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    assert [step for step, _ in metric(tmp_path / "run", "train/loss")] == [10, 12]
    for name in ("checkpoint/stall_seconds", "checkpoint/save_seconds", "checkpoint/failures_in_a_row"):
        assert len(metric(tmp_path / "run", name)) == 4, "of steps 3, 6, 9 and 12"


def test_with_another_batch_the_run_resumes_at_the_next_sequence(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ranks": 2, "train__steps": 6}
    before = tiny_config("looped", tiny_data, tmp_path / "run", **options)
    after = tiny_config("looped", tiny_data, tmp_path / "run", **options, train__global_batch_sequences=16)
    assert two_ranks.run(run_some_steps, before, 3) == [PREEMPTED, PREEMPTED]
    (tmp_path / "seen").mkdir()
    assert two_ranks.run(record_training, after, tmp_path / "seen", ("train.global_batch_sequences",)) == [DONE, DONE]
    once = tiny_config("looped", tiny_data, tmp_path / "once", ranks=2, train__steps=9)
    (tmp_path / "expected").mkdir()
    assert two_ranks.run(record_training, once, tmp_path / "expected") == [DONE, DONE]
    seen, expected = sequences(tmp_path / "seen"), sequences(tmp_path / "expected")
    assert list(seen) == [4, 5, 6]
    for number, step in enumerate(seen):
        assert seen[step] == sorted(expected[4 + 2 * number] + expected[5 + 2 * number])
    tokens = dict(metric(tmp_path / "run", "train/tokens"))
    assert [tokens[step] / 15 for step in range(1, 7)] == [8, 16, 24, 40, 56, 72]
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert "data changed: global_batch_sequences: 8 -> 16; resuming at sample 24" in log
