"""The law of the loss over loop steps at test time, recovered from made curves."""

import numpy as np
import pytest

from mythos.errors import UserError
from mythos.inspect.depth_law import fit_depth


def test_the_law_of_the_depth_is_recovered() -> None:
    depths = np.array([1, 2, 3, 4, 6, 8, 12, 16])
    law = fit_depth(depths, 2.5 + 0.9 * np.exp(-0.45 * depths))
    assert (law.floor, law.gain, law.rate) == pytest.approx((2.5, 0.9, 0.45), rel=0.02)


def test_too_few_depths_are_refused() -> None:
    with pytest.raises(UserError, match="3 depths: the law of the depth has 3 constants"):
        fit_depth(np.array([1, 2, 3]), np.array([3.0, 2.0, 1.0]))
