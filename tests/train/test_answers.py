"""Training on data of which only the answers count in the loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.synthetic import Order, make
from mythos.data.dataset import TokenDataset, answer_targets
from mythos.data.open import open_data
from mythos.data.stream import AnswerTargets
from mythos.errors import UserError
from mythos.eval.answers import read_problems
from mythos.eval.requests import Score
from mythos.loss import cross_entropy_and_z_loss
from mythos.train.batch import micro_batch
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, tiny_config
from tests.train.runs import curve, run_training

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / "addition"
    make(Order("addition", 2, 3, 64, 3, SEQUENCE_LENGTH, 0), output)
    return output


def test_the_sum_does_not_depend_on_how_rows_are_shared_out(addition: Path) -> None:
    """Micro batches with few and with many answers: the gradient of their mean is that of all rows together."""
    dataset = TokenDataset(addition, "train")
    counts = dataset.manifest.splits["train"]
    rows = dataset.read(np.arange(8))
    answers = AnswerTargets(dataset.manifest.answers, counts.counted_targets / counts.sequences)
    generator = torch.Generator().manual_seed(1)
    head_VD = torch.randn(dataset.manifest.vocabulary_size, 6, generator=generator, requires_grad=True)
    hidden_BSD = torch.randn(8, SEQUENCE_LENGTH, 6, generator=generator)

    def gradient(pieces: list[slice]) -> torch.Tensor:
        total = torch.zeros(())
        for piece in pieces:
            own = micro_batch(rows[piece], answers, CPU)
            loss = cross_entropy_and_z_loss(hidden_BSD[piece], head_VD, own.targets, count=own.divisor)
            total = total + loss.total / len(pieces)
        return torch.autograd.grad(total, head_VD)[0]

    together = gradient([slice(0, 8)])
    torch.testing.assert_close(gradient([slice(0, 4), slice(4, 8)]), together)
    torch.testing.assert_close(gradient([slice(row, row + 1) for row in range(8)]), together)

    counted = torch.from_numpy(answer_targets(rows, dataset.manifest.answers))
    logits = hidden_BSD @ head_VD.T
    plain = F.cross_entropy(logits[counted], torch.from_numpy(rows[:, 1:])[counted], reduction="sum")
    plain = plain / (counts.counted_targets / counts.sequences * 8)
    torch.testing.assert_close(together, torch.autograd.grad(plain, head_VD)[0])


def test_two_ranks_train_like_one(addition: Path, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    curves = []
    for ranks, pool in ((1, one_rank), (2, two_ranks)):
        config = tiny_config("looped", addition, tmp_path / f"run-{ranks}", ranks=ranks, train__steps=STEPS)
        assert pool.run(run_training, config) == [0] * ranks
        curves.append(curve(config, "train/loss") + curve(config, "train/gradient_norm") + curve(config, "val/loss"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_accuracy_is_the_share_of_answers_that_are_right_by_difficulty(addition: Path) -> None:
    dataset = TokenDataset(addition, "validation")
    asked = []

    def scorer(requests: list) -> list[Score]:
        """Right where the first digit of the answer is 0."""
        asked.extend(requests)
        return [Score(np.zeros(1), bool(request.tokens[request.first] == zero)) for request in requests]

    zero = 4  # after the four special tokens
    problems = read_problems(dataset)
    found = problems.accuracies(problems.solved(scorer))
    assert len(asked) == dataset.manifest.splits["validation"].documents
    assert sum(len(request.tokens) - request.first for request in asked) == (
        dataset.manifest.splits["validation"].counted_targets
    )
    digits = {number: [] for number in (1, 2, 3)}
    for request in asked:
        digits[len(request.tokens) - request.first - 1].append(request.tokens[request.first] == zero)
    expected = {number: float(np.mean(right)) for number, right in digits.items()}
    assert {number: found[f"accuracy_difficulty_{number}"] for number in expected} == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((expected[1] + expected[2]) / 2)
    assert found["accuracy_beyond"] == pytest.approx(expected[3])


def test_answers_and_text_are_not_mixed(addition: Path, tiny_data: Path, tmp_path: Path) -> None:
    sources = {name: {"directory": str(path), "weight": 1.0} for name, path in (("a", addition), ("b", tiny_data))}
    config = tiny_config("looped", tiny_data, tmp_path / "run", data__directory=None, data__sources=sources)
    with pytest.raises(UserError, match="of one of a and b only the answers count in the loss"):
        open_data(config.data, config.model.vocabulary_size, 1, 4)
