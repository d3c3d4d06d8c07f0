"""Random numbers as pure functions of their use: Philox (Salmon et al. 2011), a counter-based bit generator.

    key = (seed, period)      counter = (block, series, number, purpose)

The period is an epoch or a step. The generator itself counts the blocks of four 64-bit numbers, so streams that differ
in any other number never overlap.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers of a stream are used for. The values must never change: they define the numbers of old runs."""

    SHARD_ORDER = 0
    ROW_ORDER = 1
    SLOT_ORDER = 2
    DEPTHS = 3
    VALIDATION_ROWS = 4


def philox(purpose: Purpose, seed: int, period: int, number: int = 0, series: int = 0) -> np.random.Philox:
    """The stream of this use, from its beginning."""
    counter = np.array([0, series, number, purpose], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, period], dtype=np.uint64), counter=counter)
