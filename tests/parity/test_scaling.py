"""Laws recovered from curves that were made from known ones."""

import itertools

import numpy as np
import pytest

from mythos.errors import UserError
from mythos.parity import scaling
from mythos.parity.scaling import fit

PARAMETERS, TOKENS, STEPS = (1e8, 2e8, 4e8, 8e8), (1e9, 4e9, 16e9, 64e9), (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def fewer_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BOOTSTRAPS", 20)


def chinchilla(points_PV: np.ndarray) -> np.ndarray:
    """The published constants (arXiv 2203.15556)."""
    return 1.69 + 406.4 * points_PV[:, 0] ** -0.34 + 410.7 * points_PV[:, 1] ** -0.28


def test_the_constants_of_chinchilla_are_recovered() -> None:
    points = np.array(list(itertools.product(PARAMETERS, TOKENS)))
    found = fit(["parameters", "tokens"], points, chinchilla(points))
    assert found.law.floor == pytest.approx(1.69, rel=0.02)
    assert found.law.exponent("parameters") == pytest.approx(0.34, rel=0.02)
    assert found.law.exponent("tokens") == pytest.approx(0.28, rel=0.02)
    assert found.law.coefficient("parameters") == pytest.approx(406.4, rel=0.05)
    assert found.held_out_error < 1e-4


def test_the_exponent_of_recurrence_is_recovered() -> None:
    points = np.array(list(itertools.product(PARAMETERS[:3], TOKENS, STEPS)))
    losses = chinchilla(points) + 0.2 * points[:, 2] ** -0.8
    law = fit(["parameters", "tokens", "loop_steps"], points, losses).law
    assert [law.exponent(name) for name in law.variables] == pytest.approx([0.34, 0.28, 0.8], rel=0.02)


def test_intervals_cover_the_truth_and_a_diverged_run_does_not_bend_the_law() -> None:
    random = np.random.default_rng(1)
    points = np.array(list(itertools.product(PARAMETERS, TOKENS)))
    losses = chinchilla(points) * np.exp(random.normal(0, 5e-4, len(points)))
    losses[5] *= 1.5
    found = fit(["parameters", "tokens"], points, losses)
    for name, exponent in {"parameters": 0.34, "tokens": 0.28}.items():
        low, high = found.interval(name)
        assert low <= exponent <= high
        assert found.law.exponent(name) == pytest.approx(exponent, rel=0.15)


def test_too_few_runs_are_refused() -> None:
    points = np.array([[1e8, 1e9], [2e8, 2e9], [4e8, 4e9]])
    with pytest.raises(UserError, match="3 runs: a law over parameters, tokens has 5 constants: give at least 6"):
        fit(["parameters", "tokens"], points, chinchilla(points))
    points = np.array([[1e8, tokens] for tokens in (1e9, 2e9, 4e9, 8e9, 16e9, 32e9)])
    with pytest.raises(UserError, match="parameters: 1 different values"):
        fit(["parameters", "tokens"], points, chinchilla(points))
