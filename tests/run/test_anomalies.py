"""Spikes and collapse are found, and what is none is not."""

import numpy as np
import torch

from mythos.run.anomalies import FIRST_STEPS, CollapseWatch, LossWatch

SIGMA = 6.0


def test_the_running_mean_and_variance_of_the_first_losses_are_the_plain_ones() -> None:
    losses = np.random.default_rng(0).normal(3, 0.1, FIRST_STEPS - 1)
    watch = LossWatch()
    for loss in losses:
        watch.learn(loss, SIGMA)
    np.testing.assert_allclose([watch.mean, watch.variance], [losses.mean(), losses.var()], rtol=1e-12)


def test_a_spike_is_found_and_noise_and_a_falling_loss_are_none() -> None:
    generator = np.random.default_rng(1)
    watch = LossWatch()
    for step in range(3000):
        loss = 3 + 2 * np.exp(-step / 500) + generator.normal(0, 0.05)
        assert watch.deviations(loss) < SIGMA, step
        watch.learn(loss, SIGMA)
    assert watch.deviations(3.8) > SIGMA
    assert watch.deviations(float("nan")) == 0
    state = watch.state()
    watch.learn(float("nan"), SIGMA)
    assert watch.state() == state
    assert LossWatch(**state).deviations(3.8) == watch.deviations(3.8)


def test_a_lasting_change_is_a_spike_for_a_while_only() -> None:
    watch = LossWatch()
    for step in range(200):
        watch.learn(3 + 0.05 * (-1) ** step, SIGMA)
    spikes = 0
    for _ in range(400):
        spikes += watch.deviations(5.0) > SIGMA
        watch.learn(5.0, SIGMA)
    assert 1 <= spikes < 100


def test_nothing_is_said_of_the_first_losses() -> None:
    watch = LossWatch()
    for loss in [3.0] * (FIRST_STEPS - 1):
        watch.learn(loss, SIGMA)
        assert watch.deviations(300.0) == 0
    watch.learn(3.0, SIGMA)
    assert watch.deviations(300.0) > SIGMA


def test_collapse_is_told_after_enough_steps_in_a_row() -> None:
    even, collapsed = torch.full((2, 8), 64.0), torch.full((2, 8), 64.0)
    collapsed[1] = torch.tensor([52.0, 52, 52, 52, 52, 148, 52, 52])  # 256 tokens, two choices each
    watch = CollapseWatch(experts_per_token=2, limit_steps=3)
    told = [watch.look(load) for load in [collapsed, collapsed, even, collapsed, collapsed, collapsed, collapsed]]
    assert [text is not None for text in told] == [False] * 5 + [True, False]
    assert "expert 5 of mixture-of-experts layer 1 gets 58% of the tokens" in str(told[5])
    assert CollapseWatch(2, 1).look(even) is None
