import math

import numpy as np
import pytest

from mythos.config.depth_distribution import mean_depth
from mythos.config.loop_schema import Loop
from mythos.model.depth import draw_depths, due, fixed, plan, state_seed

SEQUENCES = 4096


def batches(size: int, count: int) -> list[range]:
    """The samples of consecutive steps."""
    return [range(first, first + size) for first in range(0, size * count, size)]


def test_poisson_depths_have_the_requested_mean_and_are_at_least_one() -> None:
    config = Loop(mean_depth=8.0, depth="poisson_per_sequence")
    depths = draw_depths(config, 1, 1, range(SEQUENCES))
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(8, abs=5 * np.sqrt(8 / SEQUENCES))
    assert depths.var() == pytest.approx(8, rel=0.15), "a Poisson distribution's variance equals its mean"


def poisson_share(mean: float, depth: int) -> float:
    """P(max(1, Poisson(mean)) = depth)."""
    return sum(math.exp(-mean) * mean**n / math.factorial(n) for n in ([0, 1] if depth == 1 else [depth]))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("sequence", [0, 5, 13])
def test_every_sequences_depth_has_the_poisson_distribution(stratified: bool, sequence: int) -> None:
    config = Loop(mean_depth=4.0, stratified=stratified)
    depths = np.array([draw_depths(config, seed, 1, range(24))[sequence] for seed in range(4000)])
    bins = [*range(1, 10)]
    observed = [(depths == depth).sum() for depth in bins] + [(depths > 9).sum()]
    expected = [4000 * poisson_share(4, depth) for depth in bins]
    expected.append(4000 - sum(expected))
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert chi_square < 27.9, "the 99.9% point of chi-square with 9 degrees of freedom"


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_stratified_micro_batches_cost_nearly_the_same(micro_batch: int) -> None:
    def spread(stratified: bool) -> float:
        config = Loop(mean_depth=8.0, stratified=stratified)
        by_step = [draw_depths(config, 0, 1, samples) for samples in batches(64, 300)]
        return np.concatenate(by_step).reshape(-1, micro_batch).sum(axis=1).std()

    assert spread(True) < {2: 0.7, 4: 0.45, 8: 0.35}[micro_batch] * spread(False)
    config = Loop(mean_depth=8.0)
    steps = np.array([draw_depths(config, 0, 1, samples).sum() for samples in batches(64, 300)])
    assert steps.std() / steps.mean() < 0.01, "the cost of steps is also nearly the same"


def test_log_normal_poisson_has_its_mean_and_is_wider_than_poisson() -> None:
    wide = Loop(mean_depth=8.0, depth="log_normal_poisson_per_sequence", stratified=False)
    depths = np.concatenate([draw_depths(wide, 0, 1, samples) for samples in batches(512, 100)])
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(8.0, rel=0.02)
    # 1 + Poisson(r), E r = 7, Var r = 49 (exp(s^2) - 1): variance 7 + that
    assert depths.var() == pytest.approx(7 + 49 * (math.exp(0.25) - 1), rel=0.05)


def test_the_curriculum_raises_the_mean_from_one() -> None:
    config = Loop(mean_depth=9.0, curriculum_steps=100)
    means = [draw_depths(config, 0, step, range(4096)).mean() for step in (1, 50, 100, 1000)]
    assert mean_depth(config, 50) == 5.0
    assert means == pytest.approx([1.4, 5.0, 9.0, 9.0], abs=0.15)
    assert set(draw_depths(Loop(mean_depth=9.0, depth="fixed", curriculum_steps=8), 0, 4, range(3)).tolist()) == {5}


@pytest.mark.parametrize("stratified", [False, True])
def test_the_depth_of_a_sample_depends_neither_on_its_step_nor_on_the_size_of_its_batch(stratified: bool) -> None:
    config = Loop(mean_depth=5.0, stratified=stratified)
    depths = draw_depths(config, 7, 1, range(300))
    for size in (4, 48, 100):
        parts = [draw_depths(config, 7, 9, samples) for samples in batches(size, 300 // size)]
        assert np.array_equal(np.concatenate(parts), depths[: 300 // size * size])
    assert len({tuple(depths[first : first + 50]) for first in range(0, 300, 50)}) == 6, "no depths are used twice"


def test_the_seeds_of_samples_differ() -> None:
    assert (
        len({state_seed(1, sample) for sample in range(1000)} | {state_seed(2, sample) for sample in range(1000)})
        == 2000
    )


def test_depths_are_a_pure_function_of_seed_and_samples() -> None:
    config = Loop(mean_depth=5.0)
    again = [draw_depths(config, 7, 3, range(64)) for _ in range(2)]
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], draw_depths(config, 7, 3, range(64, 128)))
    assert not np.array_equal(again[0], draw_depths(config, 8, 3, range(64)))


def test_per_batch_depths_are_one_number_a_step() -> None:
    config = Loop(mean_depth=5.0, depth="poisson_per_batch")
    by_step = [set(draw_depths(config, 0, 1, samples).tolist()) for samples in batches(16, 50)]
    assert all(len(depths) == 1 for depths in by_step)
    assert len(set.union(*by_step)) > 5
    assert set(draw_depths(Loop(mean_depth=5.0, depth="fixed"), 0, 1, range(16)).tolist()) == {5}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_plans_of_the_ranks_form_the_global_plan(ranks: int) -> None:
    depths = draw_depths(Loop(mean_depth=4.0), 0, 1, range(16))
    own, found = 16 // ranks, []
    for rank in range(ranks):
        first = rank * own
        part = plan(depths, 3, slice(first, first + own), range(100 + first, 100 + first + own))
        assert part.state_seeds == tuple(100 + first + place for place in part.order)
        assert list(part.with_grad) == sorted(part.with_grad, reverse=True), "the deepest first"
        assert list(part.without_grad) == sorted(part.without_grad, reverse=True)
        found += sorted(zip([first + place for place in part.order], part.without_grad, part.with_grad, strict=True))
        assert part.most_without_grad == max(0, max(depths) - 3)
        assert part.most_with_grad == min(max(depths), 3)
    assert found == [(row, max(0, depth - 3), min(depth, 3)) for row, depth in enumerate(depths)]


def test_the_last_steps_carry_gradient() -> None:
    own = plan(np.array([1, 2, 9, 3]), 3, slice(0, 4), range(4))
    assert own.order == (2, 3, 1, 0)
    assert own.with_grad == (3, 3, 2, 1)
    assert own.without_grad == (6, 0, 0, 0)
    assert fixed(5, 2).with_grad == (5, 5)


def test_shallow_sequences_join_late_and_all_end_together() -> None:
    assert [due([3, 2, 1, 1], left) for left in (4, 3, 2, 1)] == [0, 1, 2, 4]
