"""Where the time of a step goes: each moment belongs to one part, and the parts follow each other as they should."""

import time
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mythos.bench import timeline
from mythos.bench.speed import NeverAsked, SyntheticTokens
from mythos.bench.timeline import Observer, Part, Timeline
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.plan.schedule import schedule
from mythos.train.batch import StepBatches
from mythos.train.step import exchange, train_step
from tests.spawn import RankPool
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def test_every_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: next(moments))
    line = Timeline(CPU)
    line.enter(Part.LOOP)
    with line.part(Part.COMMUNICATION):
        assert line.current == Part.COMMUNICATION
    line.enter(Part.HEAD)
    seconds = line.seconds()
    expected = {Part.OTHER: 1.0, Part.LOOP: 2.0 + 4.0, Part.COMMUNICATION: 3.0, Part.HEAD: 5.0}
    assert seconds == dict.fromkeys(Part, 0.0) | expected


def parts_of_a_step(config: Config) -> tuple[list[str], list[float], bool]:
    """The parts in their order, without communication; the losses; whether everything is as before the observer."""
    methods = collective_methods()
    engine, stream, nobody = TrainingEngine(config, CPU), SyntheticTokens(config), NeverAsked()
    losses: list[float] = []
    with closing(StepBatches(config, stream, 1, 0)) as batches:

        def step(number: int) -> None:
            result = train_step(engine, batches.take(), schedule(config.optim, number, 20))
            losses.append(exchange(result, nobody, batches, nobody, CPU).loss)

        with Observer(engine, batches) as observer:
            step(0)
            entered = [part for part, _ in observer.timeline._entered]
        step(1)
    undone = methods == collective_methods() and not {"step", "backward"} & vars(engine).keys()
    assert Part.COMMUNICATION in entered
    order = [part.value for part, _ in groupby(part for part in entered if part != Part.COMMUNICATION)]
    return order, losses, undone


def collective_methods() -> list[Any]:
    return [vars(dist.ProcessGroup).get(name) for name in timeline.COLLECTIVES] + [vars(dist.Work)["wait"]]


FORWARD = ["prelude", "loop", "coda", "head", "other"]
BACKWARD = ["head", "coda", "loop", "prelude", "other"]


@pytest.mark.parametrize("model", ["mythos", "dense"])
def test_the_parts_of_a_step_follow_each_other(model: str, two_ranks: RankPool) -> None:
    micro_batch = {"train__micro_batch_sequences": 2}
    config = tiny_config(model, Path("none"), Path("none"), ranks=2, **micro_batch)
    first, second = two_ranks.run(parts_of_a_step, config)
    passes = [part for part in 2 * (FORWARD + BACKWARD) if model != "dense" or part not in ("loop", "coda")]
    data = ["other", "data", "other"]
    for order, losses, undone in (first, second):
        assert order == data + passes + ["optimizer"] + data
        assert undone
        assert losses == first[1]
        assert losses[0] != losses[1]


def test_time_in_a_collective_is_communication(two_ranks: RankPool) -> None:
    config = tiny_config("dense", Path("none"), Path("none"), ranks=2)
    waited, _ = two_ranks.run(seconds_of_a_slow_rank, config)
    assert waited >= 0.3, "rank 1 comes 0.6 s late"


def seconds_of_a_slow_rank(config: Config) -> float:
    """How long this rank waits in a collective, into which rank 1 comes 0.6 s late."""
    engine = TrainingEngine(config, CPU)
    with closing(StepBatches(config, SyntheticTokens(config), 1, 0)) as batches, Observer(engine, batches) as observer:
        dist.barrier()
        observer.timeline = Timeline(CPU)
        if dist.get_rank() == 1:
            time.sleep(0.6)
        dist.all_reduce(torch.ones(4))
        return observer.timeline.seconds()[Part.COMMUNICATION]
