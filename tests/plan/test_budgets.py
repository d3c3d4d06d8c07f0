"""The course of a run with several budgets, step by step."""

from dataclasses import replace
from pathlib import Path

import pytest

from mythos.config.load import load
from mythos.config.optim_schema import Optim
from mythos.errors import UserError
from mythos.plan.budgets import Course, Decay, Position, course_of
from mythos.plan.schedule import EXPERTS, cooldown_start, learning_rate, schedule
from tests.config.test_load import MODEL, RUN
from tests.tiny import tiny_config

OPTIM: Optim = tiny_config("dense", Path("data"), Path("run"), optim__warmup_steps=0).optim  # decays over the last half

START = Position()


def follow(course: Course, position: Position = START, stop: int = 10**6) -> tuple[list[tuple[int, int]], Position]:
    """(updates before, budget) of each step of a run that follows the course, and its position at the end."""
    steps = []
    while (budget := course.target(position)) is not None and len(steps) < stop:
        position = course.begin_decay(course.on_course(position))
        steps.append((position.updates, budget))
        position = position.after_update()
    return steps, position


def test_a_decay_to_each_budget_and_back() -> None:
    course = Course(OPTIM, 12, (6, 8))
    steps, end = follow(course)
    expected = [*((n, 6) for n in range(6)), (3, 8), *((n, 8) for n in range(4, 8)), *((n, 12) for n in range(4, 12))]
    assert steps == expected
    assert end.decays == (Decay(6, 3, 3, 6), Decay(8, 4, 7, 11), Decay(12, 6, 13, 19))
    assert end.kept == {3, 6, 7, 11, 13, 19}
    assert course.last_step(Position()) == course.last_step(end) == len(steps) == 19
    rates = [learning_rate(OPTIM, updates, budget) / OPTIM.learning_rate for updates, budget in steps]
    assert rates[:7] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3, 1])
    for n in range(19):  # the same from a checkpoint of every step
        _, position = follow(course, stop=n)
        assert follow(course, position)[0] == expected[n:]
        assert course.last_step(position) == 19


def test_the_steps_of_a_budget_are_those_of_a_run_of_its_own() -> None:
    steps, _ = follow(Course(OPTIM, 40, (10, 26)))
    for budget in (10, 26, 40):
        own = {updates: learning_rate(OPTIM, updates, budget) for updates in range(budget)}
        found = {updates: learning_rate(OPTIM, updates, target) for updates, target in steps if updates < budget / 2}
        found |= {updates: learning_rate(OPTIM, updates, target) for updates, target in steps if target == budget}
        assert found == own


def test_a_run_that_is_extended_after_its_end_goes_back_before_its_decay() -> None:
    _, end = follow(Course(OPTIM, 6))
    longer = Course(OPTIM, 12)
    assert longer.undone(end) == Decay(6, 3, 3, 6)
    steps, _ = follow(longer, end)
    assert steps == [(n, 12) for n in range(3, 12)]
    assert longer.last_step(end) == 15
    assert Course(OPTIM, 6).undone(end) is None
    gone = end.without_way_back()
    assert longer.undone(gone) is None
    assert follow(longer, gone)[0] == [(n, 12) for n in range(6, 12)]


def test_a_decay_whose_budget_is_given_up_is_undone() -> None:
    _, position = follow(Course(OPTIM, 12), stop=8)
    assert position.decay == Decay(12, 6, 6)
    longer = Course(OPTIM, 14)
    steps, end = follow(longer, position)
    assert steps == [(n, 14) for n in range(6, 14)]
    assert end.decays == (Decay(12, 6, 6, 8, reached=False), Decay(14, 7, 9, 16))
    assert end.kept == {6, 9, 16}
    at_once = Course(OPTIM, 12, (11,))  # its decay would have begun before
    assert at_once.target(replace(position, decays=(Decay(10, 6, 6),))) == 11
    assert follow(at_once, replace(position, decays=(Decay(10, 6, 6),)))[1].decays[1] == Decay(11, 6, 6, 13)


def test_without_a_decay_nothing_is_undone() -> None:
    constant = replace(OPTIM, cooldown="constant")
    steps, end = follow(Course(constant, 5))
    assert (steps, end.decays) == ([(n, 5) for n in range(5)], ())
    assert follow(Course(constant, 7), end)[0] == [(5, 7), (6, 7)]
    assert Course(constant, 7).last_step(end) == 7
    whole = replace(OPTIM, cooldown_fraction=1.0)
    _, end = follow(Course(whole, 5))
    assert end.decays == (Decay(5, 0, None, 5),)
    assert Course(whole, 7).undone(end) is None
    assert cooldown_start(whole, 5) == 0


def test_a_budget_that_was_passed_is_named() -> None:
    _, position = follow(Course(OPTIM, 40, (10,)), stop=20)
    assert position.updates == 15
    assert Course(OPTIM, 40, (10, 12)).passed(position) == [12]
    assert Course(OPTIM, 40, (10, 30)).passed(position) == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["train.budgets=[4,20]"], r"train.budgets = \[4, 20\]: must be different numbers below train.steps \(20\)"),
        (["train.budgets=[4,4]"], r"different numbers below train.steps"),
        (["train.budgets=[1]"], r"train.budgets = \[1\]: 1 x optim.cooldown_fraction \(0.5\) must leave steps before"),
        (["train.budgets=[4]", "optim.cooldown_fraction=1"], "must leave steps before the decay, and one in it"),
        (["train.budgets=[4]", "optim.cooldown=constant"], "has no effect with optim.cooldown = 'constant'"),
        (["train.budgets=[4]", "optim.kind=muon"], "needs optim.muon_weight_decay_schedule=cooldown"),
        (["train.stop_at=20"], r"train.stop_at = 20: must be below train.steps \(20\), or null"),
    ],
)
def test_budgets_that_cannot_be(overrides: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load([MODEL, RUN], ["train.steps=20", *overrides], 2)


def test_muon_decays_its_weights_with_the_rates() -> None:
    muon = ["optim.kind=muon", "optim.muon_weight_decay_schedule=cooldown"]
    config = load([MODEL, RUN], ["train.steps=20", "train.budgets=[10]", *muon], 2)
    assert course_of(config) == Course(config.optim, 20, (10,))
    decays = [schedule(config.optim, step, 20)[EXPERTS]["weight_decay"] / 0.2 for step in range(20)]
    assert decays == pytest.approx([1.0] * 10 + [1 - step / 10 for step in range(10)])
