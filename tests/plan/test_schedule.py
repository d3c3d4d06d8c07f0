"""The learning rate's warm-up, constant part and cooldown."""

import math
from pathlib import Path

import pytest

from mythos.plan.schedule import learning_rate
from tests.tiny import tiny_config


def test_the_learning_rate_rises_stays_and_falls() -> None:
    def rates(steps: int, **options: object) -> list[float]:
        overrides = {f"optim__{name}": value for name, value in options.items()}
        config = tiny_config("dense", Path("data"), Path("run"), **overrides).optim
        return [learning_rate(config, step, steps) for step in range(steps)]

    linear = rates(10, learning_rate=1.0, warmup_steps=2, cooldown="linear", cooldown_fraction=0.5)
    assert linear == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = rates(
        4, learning_rate=2.0, warmup_steps=0, cooldown="cosine", cooldown_fraction=1.0, final_learning_rate_fraction=0.5
    )
    assert cosine == pytest.approx([1 + 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert rates(3, learning_rate=1.0, warmup_steps=0, cooldown="constant") == [1, 1, 1]
    assert max(rates(5, learning_rate=1.0, warmup_steps=100, cooldown="constant")) == pytest.approx(0.05)
