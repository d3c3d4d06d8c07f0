import numpy as np
import pytest

from mythos.config.schema import Loop
from mythos.model.depth import draw_depths, due, fixed, plan

SEQUENCES = 4096


def test_poisson_depths_have_the_asked_mean_and_are_at_least_one() -> None:
    config = Loop(mean_depth=8.0, depth="poisson_per_sequence")
    depths = draw_depths(config, 1, 1, SEQUENCES)
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(8, abs=5 * np.sqrt(8 / SEQUENCES))
    assert depths.var() == pytest.approx(8, rel=0.15), "a Poisson distribution's variance equals its mean"


def test_a_plan_is_a_pure_function_of_seed_and_step() -> None:
    config = Loop(mean_depth=5.0)
    again = [draw_depths(config, 7, 3, 64) for _ in range(2)]
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], draw_depths(config, 7, 4, 64))
    assert not np.array_equal(again[0], draw_depths(config, 8, 3, 64))


def test_per_batch_depths_are_one_number_a_step() -> None:
    config = Loop(mean_depth=5.0, depth="poisson_per_batch")
    by_step = [set(draw_depths(config, 0, step, 16).tolist()) for step in range(50)]
    assert all(len(depths) == 1 for depths in by_step)
    assert len(set.union(*by_step)) > 5
    assert set(draw_depths(Loop(mean_depth=5.0, depth="fixed"), 0, 1, 16).tolist()) == {5}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_parts_make_up_the_whole_plan(ranks: int) -> None:
    depths = draw_depths(Loop(mean_depth=4.0), 0, 1, 16)
    own = 16 // ranks
    parts = [plan(depths, 3, slice(rank * own, (rank + 1) * own)) for rank in range(ranks)]
    whole = plan(depths, 3, slice(0, 16))
    assert sum((part.with_grad for part in parts), ()) == whole.with_grad
    assert sum((part.without_grad for part in parts), ()) == whole.without_grad
    assert {(part.most_without_grad, part.most_with_grad) for part in parts} == {
        (max(depths) - 3 if max(depths) > 3 else 0, min(max(depths), 3))
    }


def test_the_last_steps_carry_gradient() -> None:
    own = plan(np.array([1, 2, 3, 9]), 3, slice(0, 4))
    assert own.with_grad == (1, 2, 3, 3)
    assert own.without_grad == (0, 0, 0, 6)
    assert fixed(5, 2).with_grad == (5, 5)


def test_shallow_sequences_join_late_and_all_end_together() -> None:
    steps = [1, 3, 2]
    assert [due(steps, left) for left in (3, 2, 1)] == [[1], [1, 2], [0, 1, 2]]
