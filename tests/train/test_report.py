"""The metrics that a step reports."""

import numpy as np
import pytest
import torch

from mythos.train.report import depth_metrics, expert_metrics
from mythos.train.step import _means, _peak_memory_gib


def test_expert_metrics() -> None:
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 12.0, 4.0]])
    assert expert_metrics(load) == {"moe/load_max_over_mean": 3.0, "moe/experts_unused": 2.0}


def test_depth_metrics() -> None:
    assert depth_metrics(np.array([1, 3, 8]), 4) == {"depth/mean": 4.0, "depth/with_grad": pytest.approx(8 / 3)}


def test_diagnostics_are_averaged_over_micro_batches() -> None:
    parts = [{"loop/state_norm": torch.tensor(2.0)}, {"loop/state_norm": torch.tensor(4.0)}]
    assert _means(parts) == {"loop/state_norm": 3.0}
    assert _means([{}]) == {}


def test_peak_memory_is_that_of_the_process() -> None:
    assert _peak_memory_gib(torch.device("cpu")) > 0.05
