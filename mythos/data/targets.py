"""Which targets of a row count in the loss."""

import numpy as np

from mythos.data.dataset import answer_targets
from mythos.data.format import Answers
from mythos.loss import IGNORED


def counted_targets(rows: np.ndarray, answers: Answers | None) -> np.ndarray:
    """The targets of rows, (..., sequence_length); those that do not count in the loss are ``IGNORED``."""
    targets = rows[..., 1:]
    return targets if answers is None else np.where(answer_targets(rows, answers), targets, IGNORED)
