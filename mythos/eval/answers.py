"""How often a model answers synthetic problems (`mythos data synthetic`), each alone, by difficulty.

A problem is solved if every token of its answer is the likeliest one, which greedy decoding would choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos.data.dataset import TokenDataset
from mythos.data.format import Answers, Synthetic
from mythos.eval.requests import Request, Scorer, in_parts

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Problems:
    """The problems of a validation split."""

    requests: list[Request]
    difficulties_N: np.ndarray
    trained_difficulty: int

    def items(self) -> dict[str, np.ndarray]:
        """Of each problem its difficulty, and whether that is beyond those of training."""
        return {
            "problems_difficulty": self.difficulties_N,
            "problems_beyond": self.difficulties_N > self.trained_difficulty,
        }

    def solved(self, scorer: Scorer) -> np.ndarray:
        """Whether each problem is solved, (N,)."""
        return np.array([score.is_greedy for part in in_parts(self.requests) for score in scorer(part)], dtype=bool)

    def accuracies(self, solved_N: np.ndarray) -> dict[str, float]:
        """The share of problems that are solved: ``accuracy_difficulty_N`` of each difficulty, and the means over those
        of training, ``accuracy``, and over those beyond, ``accuracy_beyond``."""
        levels = np.unique(self.difficulties_N).tolist()
        by_level = {level: float(solved_N[self.difficulties_N == level].mean()) for level in levels}
        found = {"accuracy": _mean([share for level, share in by_level.items() if level <= self.trained_difficulty])}
        if beyond := [share for level, share in by_level.items() if level > self.trained_difficulty]:
            found["accuracy_beyond"] = _mean(beyond)
        return found | {f"accuracy_difficulty_{level}": accuracy for level, accuracy in by_level.items()}


def read_problems(dataset: TokenDataset) -> Problems:
    """All problems of the validation split. Raises UserError if a shard is missing or damaged."""
    manifest = dataset.manifest
    assert manifest.answers is not None
    assert manifest.synthetic is not None
    requests, difficulties_N = _problems(dataset, manifest.answers, manifest.synthetic)
    return Problems(requests, difficulties_N, manifest.synthetic.trained_difficulty)


def _problems(dataset: TokenDataset, answers: Answers, synthetic: Synthetic) -> tuple[list[Request], np.ndarray]:
    """All problems of the validation split, and the difficulty of each."""
    requests, difficulties = [], []
    for first in range(0, len(dataset), ROWS_AT_ONCE):
        numbers = np.arange(first, min(first + ROWS_AT_ONCE, len(dataset)))
        for number, row in zip(numbers.tolist(), dataset.read(numbers), strict=True):
            starts, ends = np.flatnonzero(row == answers.begin_id), np.flatnonzero(row == answers.end_id)
            beginnings = [0, *(ends + 1).tolist()]
            for begin, start, end in zip(beginnings, starts.tolist(), ends.tolist(), strict=False):
                seed = number * len(row) + begin
                requests.append(Request(row[begin:end].astype(np.int32), start + 1 - begin, seed))
                difficulties.append(1 + number // synthetic.validation_rows)
    return requests, np.array(difficulties)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
