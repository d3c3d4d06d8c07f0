"""The validation loss is the plain mean over a fixed random set of rows, however they are spread over ranks."""

import shutil
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source
from mythos.eval.batches import random_rows, validation_rows
from mythos.eval.forward import exit_rule
from mythos.eval.routing import ExpertLoad, watched_routing
from mythos.eval.validation import validate, validation_losses
from mythos.loss import Losses
from mythos.model import LoopedTransformer, build_model, depth
from mythos.ranks.watchdog import Watchdog
from mythos.run import console
from mythos.run.console import start_logging
from tests.data.conftest import write_data_set
from tests.model.helpers import randomise
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config

CPU = torch.device("cpu")


def measure(kind: str, data: Path, sequences: int | None, micro_batch: int) -> dict[str, Any]:
    """The losses and, with experts, their shares of the choices by layer and loop step."""
    config = tiny_config(kind, data, data)
    model = randomise(build_model(config), deviation=0.1).eval()
    sources = [Source("data", 1.0, TokenDataset(data, "validation"))]
    with torch.no_grad():
        if kind == "dense":
            return validation_losses(model, sources, (), None, sequences, micro_batch, CPU)
        assert isinstance(model, LoopedTransformer)
        load = ExpertLoad(model.loop.core, 2, config.model.core_experts.experts, CPU)
        losses = validation_losses(model, sources, (1, 3), 2, sequences, micro_batch, CPU, load)
        return losses | {"load": load.shares_LTE().tolist()}


@pytest.mark.parametrize(("sequences", "micro_batch"), [(6, 2), (5, 4), (1, 4), (100, 3), (None, 2)])
def test_it_equals_one_sequence_after_the_other(
    sequences: int | None, micro_batch: int, one_rank: RankPool, two_ranks: RankPool, tiny_data: Path
) -> None:
    model = randomise(build_model(tiny_config("looped-moe", tiny_data, tiny_data)), deviation=0.1).eval()
    dataset = TokenDataset(tiny_data, "validation")
    numbers = validation_rows(dataset, sequences).tolist()
    assert len(numbers) == min(sequences or 100, len(dataset))
    expected: dict[str, Any] = {}
    assert isinstance(model, LoopedTransformer)
    layers, routings = len(model.loop.core), []
    with torch.no_grad():
        for name, steps in (("loss", 2), ("loss_depth_1", 1), ("loss_depth_3", 3)):
            losses = []
            for number in numbers:
                row = torch.from_numpy(dataset[number])[None]
                with watched_routing(model.loop.core, routings.append if name == "loss" else lambda _: None):
                    logits = model(row[:, :-1], None, depth.fixed(steps, 1, [number]))
                losses.append(F.cross_entropy(logits[0], row[0, 1:]).item())
            expected[f"val/{name}"] = pytest.approx(statistics.fmean(losses), rel=1e-5)
            if name == "loss" and len(losses) > 1:
                error = statistics.stdev(losses) / len(losses) ** 0.5
                expected["val/loss_standard_error"] = pytest.approx(error, rel=1e-4)
    chosen = torch.stack([each.chosen_BSE for each in routings]).float()
    choices_TLE = chosen.unflatten(0, (len(numbers), 2, layers)).sum(dim=(0, 3, 4))
    expected["load"] = (choices_TLE / choices_TLE.sum(dim=-1, keepdim=True)).transpose(0, 1).tolist()
    found = [
        each
        for pool in (one_rank, two_ranks)
        for each in pool.run(measure, "looped-moe", tiny_data, sequences, micro_batch)
    ]
    assert found == [found[0]] * 3, "to the last bit"
    assert np.allclose(found[0].pop("load"), expected.pop("load"))
    assert found[0] == expected


def test_a_dense_model_has_one_loss(two_ranks: RankPool, tiny_data: Path) -> None:
    found = two_ranks.run(measure, "dense", tiny_data, 7, 2)
    assert found[0] == found[1]
    assert list(found[0]) == ["val/loss", "val/loss_standard_error"]


def test_the_rows_depend_only_on_the_data(tiny_data: Path, tmp_path: Path) -> None:
    rows = validation_rows(TokenDataset(tiny_data, "validation"), 3)
    moved = TokenDataset(Path(shutil.copytree(tiny_data, tmp_path / "moved")), "validation")
    assert validation_rows(moved, 3).tolist() == rows.tolist()
    other = TokenDataset(write_data_set(tmp_path / "other", VOCABULARY, seed=1), "validation")
    assert other.fingerprint != moved.fingerprint
    # Other numbers would make the losses of older runs on the same data incomparable.
    assert random_rows("0123456789abcdef" * 4, 1000, 5).tolist() == [363, 373, 675, 777, 898]


def test_a_smaller_set_is_a_part_of_a_larger_one() -> None:
    small, large = (random_rows("5" * 64, 393, sequences).tolist() for sequences in (32, 100))
    assert len(set(small)) == 32
    assert set(small) < set(large)
    assert large == sorted(large)


def test_the_standard_error_covers_the_loss_on_all_rows_although_their_order_matters() -> None:
    """The losses rise along the rows, as in a corpus that is sorted by subject."""
    losses = np.linspace(4.0, 6.0, 393)
    covered = 0
    for number in range(200):
        chosen = losses[random_rows(f"{number:064x}"[::-1], len(losses), 32)]
        covered += abs(chosen.mean() - losses.mean()) < 2 * chosen.std(ddof=1) / 32**0.5
    assert 185 <= covered <= 200
    assert losses[:32].mean() < 4.2


def rows_read_at_each_pass(data: Path, micro_batch: int) -> list[int]:
    """How many rows have been read when each forward pass begins."""
    dataset, read, counts = TokenDataset(data, "validation"), [], []

    def counted(numbers: np.ndarray) -> np.ndarray:
        read.extend(numbers)
        return TokenDataset.read(dataset, numbers)

    def forward(tokens: torch.Tensor, targets: torch.Tensor, plan: None) -> Losses:
        counts.append(len(read))
        return Losses(torch.zeros(()), torch.zeros(()), {}, torch.zeros(len(tokens)))

    dataset.read = counted  # type: ignore[method-assign]
    validation_losses(forward, [Source("data", 1.0, dataset)], (), None, None, micro_batch, CPU)
    return counts


def test_one_micro_batch_is_read_at_a_time(one_rank: RankPool, tiny_data: Path) -> None:
    assert one_rank.run(rows_read_at_each_pass, tiny_data, 2) == [[2, 4, 6, 8]]


def validate_slowly(data: Path, log_file: Path) -> float:
    """A validation of eight passes that takes twice the watchdog's limit; returns the loss."""
    start_logging(log_file, dist.get_rank())

    def slow_pass(tokens: torch.Tensor, *rest: Any, **options: Any) -> Losses:
        time.sleep(0.4)
        return Losses(torch.ones(()), torch.ones(()), {}, torch.ones(len(tokens)))

    class SlowEngine(SimpleNamespace):
        __call__ = staticmethod(slow_pass)

    engine = SlowEngine(device=CPU, evaluation=nullcontext)
    config = tiny_config("dense", data, data, eval__sequences=None, train__micro_batch_sequences=1)
    sources = [Source("data", 1.0, TokenDataset(data, "validation"))]
    with pytest.MonkeyPatch.context() as patch, Watchdog(1.5) as watchdog:
        patch.setattr(console, "NOTICE_EVERY_S", 0.0)
        watchdog.started()
        found = validate(engine, sources, config, 7, watchdog)
    assert found is not None
    return found.losses["val/loss"]


def test_a_validation_may_take_longer_than_the_watchdogs_limit_and_reports_its_progress(
    one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    assert one_rank.run(validate_slowly, tiny_data, tmp_path / "log") == [1.0]
    lines = (tmp_path / "log").read_text(encoding="utf-8")
    assert "validation on data: 3 of 7 sequences" in lines
    assert "step 7 val/loss 1.0000 val/loss_standard_error 0.0000" in lines


def steps_taken(data: Path, options: dict[str, Any]) -> list[int]:
    """How many loop steps a validation pass takes on this rank; rank 1's state settles later than rank 0's."""
    overrides = {f"eval__{name}": value for name, value in options.items()}
    config = tiny_config("mythos", data, data, **overrides)
    model = randomise(build_model(config), deviation=0.05).eval()
    rule, steps = exit_rule(config.eval), []
    slow = 3 * dist.get_rank()

    def late(before: torch.Tensor, after: torch.Tensor, halted: torch.Tensor) -> torch.Tensor:
        steps.append(None)
        if len(steps) <= slow:  # this rank alone is not done
            return rule(before, after + 1e6, torch.zeros_like(halted))
        return rule(before, after, halted)

    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        model(tokens, None, depth.fixed(40, 2), late)
    return len(steps)


@pytest.mark.parametrize("options", [{"exit_change": 0.05}, {"exit_when_halted": True}])
def test_all_ranks_leave_the_loop_at_the_same_step(
    options: dict[str, Any], two_ranks: RankPool, tiny_data: Path
) -> None:
    first, second = two_ranks.run(steps_taken, tiny_data, options)
    assert first == second
    assert 3 < first < 40
