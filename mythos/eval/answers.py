"""How often a model answers synthetic problems (`mythos data synthetic`), each alone, by difficulty.

A problem is solved if every token of its answer is the likeliest one, which greedy decoding would choose.
"""

from collections.abc import Sequence

import numpy as np

from mythos.data.dataset import TokenDataset
from mythos.data.format import Answers, Synthetic
from mythos.eval.requests import Request, Scorer, in_parts

ROWS_AT_ONCE = 256


def accuracies(dataset: TokenDataset, scorer: Scorer) -> dict[str, float]:
    """The share of problems that are solved: ``accuracy_difficulty_N`` of each difficulty, and the means over those of
    training, ``accuracy``, and over those beyond, ``accuracy_beyond``.

    Raises:
        UserError: a shard is missing or damaged.
    """
    manifest = dataset.manifest
    assert manifest.answers is not None
    assert manifest.synthetic is not None
    requests, difficulties = _problems(dataset, manifest.answers, manifest.synthetic)
    solved = np.array([score.is_greedy for part in in_parts(requests) for score in scorer(part)], dtype=bool)
    levels = range(1, manifest.synthetic.most_difficult + 1)
    by_level = {level: float(solved[difficulties == level].mean()) for level in levels}
    trained = manifest.synthetic.trained_difficulty
    found = {"accuracy": _mean([by_level[level] for level in levels if level <= trained])}
    if beyond := [by_level[level] for level in levels if level > trained]:
        found["accuracy_beyond"] = _mean(beyond)
    return found | {f"accuracy_difficulty_{level}": accuracy for level, accuracy in by_level.items()}


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
