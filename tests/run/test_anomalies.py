"""Spikes and collapse are reported, and nothing else is."""

from dataclasses import asdict

import numpy as np
import torch

from mythos.run.anomalies import FIRST_STEPS, CollapseWatch, LossStatistics

SIGMA = 6.0


def test_the_running_mean_and_variance_of_the_first_losses_are_the_plain_ones() -> None:
    losses = np.random.default_rng(0).normal(3, 0.1, FIRST_STEPS - 1)
    watch = LossStatistics()
    for loss in losses:
        watch.update(loss, SIGMA)
    np.testing.assert_allclose([watch.mean, watch.variance], [losses.mean(), losses.var()], rtol=1e-12)


def test_a_spike_is_found_and_noise_and_a_falling_loss_are_not() -> None:
    generator = np.random.default_rng(1)
    watch = LossStatistics()
    for step in range(3000):
        loss = 3 + 2 * np.exp(-step / 500) + generator.normal(0, 0.05)
        assert watch.deviations(loss) < SIGMA, step
        watch.update(loss, SIGMA)
    assert watch.deviations(3.8) > SIGMA
    assert watch.deviations(float("nan")) == 0
    state = asdict(watch)
    watch.update(float("nan"), SIGMA)
    assert asdict(watch) == state
    assert LossStatistics(**state).deviations(3.8) == watch.deviations(3.8)


def test_a_lasting_change_is_a_spike_for_a_while_only() -> None:
    watch = LossStatistics()
    for step in range(200):
        watch.update(3 + 0.05 * (-1) ** step, SIGMA)
    spikes = 0
    for _ in range(400):
        spikes += watch.deviations(5.0) > SIGMA
        watch.update(5.0, SIGMA)
    assert 1 <= spikes < 100


def test_the_first_losses_are_never_spikes() -> None:
    watch = LossStatistics()
    for loss in [3.0] * (FIRST_STEPS - 1):
        watch.update(loss, SIGMA)
        assert watch.deviations(300.0) == 0
    watch.update(3.0, SIGMA)
    assert watch.deviations(300.0) > SIGMA


def test_a_collapse_is_reported_after_enough_steps_in_a_row() -> None:
    even, collapsed = torch.full((2, 8), 64.0), torch.full((2, 8), 64.0)
    collapsed[1] = torch.tensor([52.0, 52, 52, 52, 52, 148, 52, 52])  # 256 tokens, two choices each
    watch = CollapseWatch(experts_per_token=2, limit_steps=3)
    warnings = [watch.update(load) for load in [collapsed, collapsed, even, collapsed, collapsed, collapsed, collapsed]]
    assert [text is not None for text in warnings] == [False] * 5 + [True, False]
    assert "expert 5 of mixture-of-experts layer 1 gets 58% of the tokens" in str(warnings[5])
    assert CollapseWatch(2, 1).update(even) is None
