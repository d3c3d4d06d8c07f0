"""`mythos compare`: runs in groups, at equal budgets, with what can be said about them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.commands import invoke
from mythos.errors import UserError
from mythos.parity import statistics
from mythos.parity.compare import AXES, Difference, difference, differences
from mythos.parity.groups import Group, differing_options, read_groups
from mythos.parity.measures import Arm
from mythos.parity.pictures import draw_pictures
from mythos.parity.results import read_run
from tests.parity.made_runs import FLOPS_PER_STEP, SECONDS, training_line, write_evaluation, write_lines, write_run

DEPTH = 3
"""Of the tiny looped model."""
SEEDS = (1, 2, 3)


def falling(level: float, slope: float = 0.5) -> Callable[[int], float]:
    return lambda step: level - slope * math.log(max(step, 1))


def write_two(directory: Path, gap: float, spread: float = 0.001, done: int | None = None) -> None:
    """A dense group and a looped one that is better by ``gap``, three seeds each."""
    for seed in SEEDS:
        write_run(directory / f"dense/seed-{seed}", "dense", seed, falling(5 + seed * spread), done)
        write_run(directory / f"looped/seed-{seed}", "looped", seed, falling(5 - gap + seed * spread))


def by_axis(groups: tuple[Group, ...], metric: str | None = None) -> dict[str, Difference]:
    dense, looped = (next(each for each in groups if each.name == name) for name in ("dense", "looped"))
    return {axis: difference(looped, dense, axis, metric) for axis in AXES}


def test_runs_of_one_configuration_are_one_group_and_their_seeds_are_told_apart(tmp_path: Path) -> None:
    write_two(tmp_path, 0.1)
    write_run(tmp_path / "copy", "dense", 2, falling(5), done=50)
    write_run(tmp_path / "other-micro-batch", "dense", 9, falling(5), train__micro_batch_sequences=2)
    write_run(tmp_path / "rate/seed-1", "dense", 1, falling(5), optim__learning_rate=0.5)
    write_run(tmp_path / "begun", "dense", 7, falling(5), done=5)
    for name, file in (("no-configuration", "config.yaml"), ("bad-metrics", "metrics.jsonl")):
        write_run(tmp_path / name, "dense", 8, falling(5))
        (tmp_path / name / file).write_text("[", encoding="utf-8")
    write_evaluation(tmp_path / "dense/seed-1", 100, np.ones(4), None)
    (tmp_path / "dense/seed-1/evaluations/step_00000100_0.npz").write_bytes(b"damaged")

    found = read_groups([tmp_path, tmp_path / "dense"])
    groups = {group.name: sorted(group.arm.seeds) for group in found.groups}
    assert groups == {"dense": [1, 2, 3, 9], "looped": [1, 2, 3], "rate": [1]}
    reasons = "\n".join(found.left_out)
    for part in (
        f"{tmp_path}/copy: configuration and seed are those of {tmp_path}/dense/seed-2: counted once",
        f"{tmp_path}/begun: no validation after its first step yet",
        f"{tmp_path}/no-configuration",
        f"{tmp_path}/bad-metrics: no validation",
        f"{tmp_path}/dense/seed-1/evaluations/step_00000100_0.npz: damaged",
    ):
        assert part in reasons
    assert len(found.left_out) == 5
    of_name = {group.name: group for group in found.groups}
    differing = differing_options([of_name["dense"], of_name["rate"]])
    assert {path: values[1] for path, values in differing.items()} == {"optim.learning_rate": 0.5}


def test_equal_budgets_are_those_that_both_groups_have_reached(tmp_path: Path) -> None:
    """The loss falls linearly over the logarithm of the step, as it is interpolated, so differences are exact."""
    gap, ratio = 0.1, FLOPS_PER_STEP["looped"] / FLOPS_PER_STEP["dense"]
    write_two(tmp_path, gap, done=60)
    found = by_axis(read_groups([tmp_path]).groups)
    assert found["tokens"].interval.estimate == pytest.approx(-gap)
    assert found["tokens"].shares == pytest.approx((0.6, 0.6))
    assert found["hours"].interval.estimate == pytest.approx(-gap)
    assert found["hours"].budget == pytest.approx(60 * SECONDS / 3600)
    # With the dense group's FLOPs the looped one has done a third of its steps, and its loss is higher by 0.5 log 3.
    assert found["flops"].budget == pytest.approx(60 * FLOPS_PER_STEP["dense"])
    assert found["flops"].shares == pytest.approx((0.2, 0.6))
    assert found["flops"].interval.estimate == pytest.approx(-gap + 0.5 * math.log(ratio))
    assert [each.judgement for each in found.values()] == ["better", "worse", "better"]
    assert {each.measured_on for each in found.values()} == {"runs"}
    seeds = np.array([[0.001], [0.002], [0.003]])
    expected = statistics.difference(5 - gap + seeds, 5 + seeds)
    assert found["tokens"].interval.low == pytest.approx(expected.low)


def test_nothing_is_claimed_of_seed_noise_or_of_one_seed(tmp_path: Path) -> None:
    write_two(tmp_path, 0.02, spread=0.05)
    for each in by_axis(read_groups([tmp_path]).groups).values():
        assert each.judgement == ("worse" if each.axis == "flops" else "not distinguished")
    found = read_groups([tmp_path / "dense/seed-1", tmp_path / "looped/seed-1"]).groups
    assert {row.judgement for row in differences(found, found[0])} == {"no claim: one seed is no verdict"}


def test_documents_are_compared_in_pairs_where_both_groups_were_evaluated(tmp_path: Path) -> None:
    write_two(tmp_path, 0.1)
    random = np.random.default_rng(1)
    hard_N = random.normal(30, 5, 200)
    nats = {}
    for seed in SEEDS:
        for name, depth, level in (("dense", None, 0.0), ("looped", DEPTH, -0.5)):
            nats[name, seed] = hard_N + level + random.normal(0, 0.5, 200)
            write_evaluation(tmp_path / name / f"seed-{seed}", 100, nats[name, seed], depth)
    found = by_axis(read_groups([tmp_path]).groups)
    arms = [np.stack([nats[name, seed] for seed in SEEDS]) / 40 / math.log(2) for name in ("looped", "dense")]
    expected = statistics.difference(*arms)
    assert found["tokens"].interval == expected
    assert (found["tokens"].metric, found["tokens"].measured_on) == ("bits_per_byte", "200 documents")
    assert found["tokens"].judgement == "better"
    assert expected.high - expected.low < hard_N.std() / 40 / math.log(2) / 10, "what is common to both cancels"
    # At the dense group's FLOPs the looped one has no evaluation.
    assert (found["flops"].metric, found["flops"].measured_on) == ("validation_loss", "runs")


def test_a_checkpoint_that_was_trained_on_after_the_last_validation_is_not_at_the_budget(tmp_path: Path) -> None:
    for seed in SEEDS:
        dense, looped = (tmp_path / f"{name}/seed-{seed}" for name in ("dense", "looped"))
        write_run(dense, "dense", seed, falling(5), done=50)
        write_run(looped, "looped", seed, falling(4.9), done=95, eval__every=50)
        write_evaluation(dense, 50, np.full(20, 30.0), None)
        write_evaluation(looped, 95, np.full(20, 29.0), DEPTH)
    found = by_axis(read_groups([tmp_path]).groups)["tokens"]
    assert found.shares == pytest.approx((0.5, 0.5))
    assert (found.metric, found.measured_on) == ("validation_loss", "runs")
    assert found.interval.estimate == pytest.approx(-0.1)


OTHERS: list[dict[str, Any]] = [
    {"eval": {"exit_change": 0.3}},
    {"eval": {"exit_when_halted": True}},
    {"precision": "bf16"},
    {"wanted": {"with_bos": False}},
]


@pytest.mark.parametrize("settings", OTHERS)
def test_evaluations_with_other_settings_are_not_compared(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_two(tmp_path, 0.1)
    for seed in SEEDS:
        dense, looped = (tmp_path / f"{name}/seed-{seed}" for name in ("dense", "looped"))
        write_evaluation(dense, 100, np.full(20, 30.0 + seed), None)
        write_evaluation(looped, 100, np.full(20, 90.0), DEPTH, number=2, settings=settings)
    row = by_axis(read_groups([tmp_path]).groups)["tokens"]
    assert (row.metric, row.measured_on) == ("validation_loss", "runs")
    for seed in SEEDS:
        nats_N = np.full(20, 28.0 + seed)
        write_evaluation(tmp_path / f"looped/seed-{seed}", 100, nats_N, DEPTH, number=1)
    groups = read_groups([tmp_path]).groups
    row = by_axis(groups)["tokens"]
    assert (row.metric, row.measured_on) == ("bits_per_byte", "20 documents")
    assert row.interval.estimate == pytest.approx(-2 / 40 / math.log(2))
    (arm,) = (group.arm for group in groups if group.name == "looped")
    assert arm.values("loss").mean() == pytest.approx(3.0), "also in the table of groups"


def test_an_evaluation_without_the_mean_depth_is_left_out(tmp_path: Path) -> None:
    write_two(tmp_path, 0.1)
    for seed in SEEDS:
        write_evaluation(tmp_path / f"dense/seed-{seed}", 100, np.full(20, 30.0), None)
        write_evaluation(tmp_path / f"looped/seed-{seed}", 100, np.full(20, 29.0), DEPTH, number=1)
        write_evaluation(tmp_path / f"looped/seed-{seed}", 100, np.full(20, 28.0), 8, number=2)
    found = read_groups([tmp_path])
    row = by_axis(found.groups)["tokens"]
    assert row.interval.estimate == pytest.approx(-1 / 40 / math.log(2))
    assert len(found.left_out) == len(SEEDS)
    assert "step_00000100_2.json: not measured at the mean depth 3, but at 8: evaluate" in found.left_out[0]


def test_accuracy_by_difficulty_is_drawn_of_the_same_problems_alone(tmp_path: Path) -> None:
    write_two(tmp_path / "runs", 0.1)
    levels_N = np.array([1, 1, 2, 2, 3])
    runs = {name: read_run(tmp_path / f"runs/{name}/seed-1") for name in ("dense", "looped")}

    def drawn(levels_of_looped: np.ndarray) -> set[str]:
        arms = []
        for name, suffix, own in (("dense", "", levels_N), ("looped", f"_depth_{DEPTH}", levels_of_looped)):
            items = {"problems_difficulty": own, "problems_beyond": own > 2, f"problems_solved{suffix}": own < 2}
            arms.append(Arm(name, (replace(runs[name], items=items),)))
        return set(draw_pictures(arms, "validation_loss"))

    assert drawn(levels_N) == {"arms", "curves", "difficulty"}
    assert drawn(levels_N[1:]) == {"arms", "curves"}
    assert drawn(levels_N[::-1]) == {"arms", "curves"}


def test_the_load_of_the_experts_is_drawn_of_the_arms_that_have_some(tmp_path: Path) -> None:
    write_two(tmp_path / "runs", 0.1)
    dense, looped = (read_run(tmp_path / f"runs/{name}/seed-1") for name in ("dense", "looped"))
    load_LTE = np.array([[[0.75, 0.25], [0.25, 0.75]], [[0.5, 0.5], [1.0, 0.0]]])
    without = replace(looped, items={})
    runs = {"dense": (dense,), "one": (without, replace(looped, items={"expert_load": load_LTE[:1]}))}
    two = {"two": (replace(looped, items={"expert_load": load_LTE}),)}
    arms = [Arm(name, own) for name, own in (runs | two).items()]
    figure = draw_pictures(arms, "validation_loss")["experts"].figure
    maps = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes if axis.images and axis.get_title()}
    expected = {
        "one, seed 1": load_LTE[0],
        "two, seed 1, core layer 0": load_LTE[0],
        "two, seed 1, core layer 1": load_LTE[1],
    }
    assert maps.keys() == expected.keys()
    for name, load_TE in expected.items():
        assert np.array_equal(maps[name], 2 * load_TE), "times the number of experts"
    assert "experts" not in draw_pictures(arms[:1], "validation_loss")


def test_differences_from_the_reference_are_drawn(tmp_path: Path) -> None:
    write_two(tmp_path / "runs", 0.1)
    runs = {
        name: tuple(read_run(tmp_path / f"runs/{name}/seed-{seed}") for seed in SEEDS) for name in ("dense", "looped")
    }
    arms = [Arm(name, own) for name, own in runs.items()]
    picture = draw_pictures(arms, "validation_loss", "dense")["arms"]
    assert "difference from dense" in picture.text
    interval, estimate, zero = picture.figure.axes[1].lines
    dense, looped = (np.mean([run.curve.losses[-1] for run in own]) for own in runs.values())
    assert list(zero.get_xdata()) == [0, 0]
    assert estimate.get_xdata()[0] == pytest.approx(looped - dense)
    assert interval.get_xdata()[0] <= looped - dense <= interval.get_xdata()[1]
    assert interval.get_ydata()[0] == 1, "in the row of its arm"
    assert len(draw_pictures(arms, "validation_loss", "absent")["arms"].figure.axes) == 1


def test_of_other_tokenizers_bits_per_byte_alone_are_compared(tmp_path: Path) -> None:
    write_two(tmp_path, 0.1)
    random = np.random.default_rng(2)
    for seed in SEEDS:
        (tmp_path / f"looped/seed-{seed}/tokenizer.json").write_text("other", encoding="utf-8")
    groups = read_groups([tmp_path]).groups
    for each in by_axis(groups).values():
        assert each.interval is None
        assert "other validation rows (tokenizer): evaluate both" in each.judgement
    for seed in SEEDS:
        core = {"eval/core": 0.2 + seed / 1000}
        write_evaluation(tmp_path / f"dense/seed-{seed}", 100, random.normal(30, 3, 300), None, settings=core)
        items = {"documents": np.arange(1000, 1280), "documents_bytes": np.full(280, 40.0)}
        items |= {"documents_tokens": np.full(280, 9)}
        core = {f"eval/core_depth_{DEPTH}": 0.3 - seed / 1000}
        looped = tmp_path / f"looped/seed-{seed}"
        write_evaluation(looped, 100, random.normal(28, 3, 280), DEPTH, settings=core, **items)
    groups = read_groups([tmp_path]).groups
    row = by_axis(groups)["tokens"]
    assert (row.metric, row.measured_on) == ("bits_per_byte", "280 and 300 other documents")
    assert row.interval.estimate == pytest.approx(-2 / 40 / math.log(2), rel=0.3)
    assert row.interval.high - row.interval.low > 3.9 * 3 * math.sqrt(2 / 300 / 3) / 40 / math.log(2) * 0.9
    assert "loss depends on tokenizer and packing" in by_axis(groups, "loss")["tokens"].judgement
    score = by_axis(groups, "core")["tokens"]
    assert score.interval.estimate == pytest.approx(0.1 - 2 * np.mean(SEEDS) / 1000)
    assert score.judgement == "better"


def test_the_decays_from_which_a_run_has_returned_are_not_on_its_course(tmp_path: Path) -> None:
    """A decay from 4 to 6 updates, then the constant phase from 4 on to 8."""
    write_run(tmp_path / "run", "dense", 1, falling(5))
    lines = []
    for step, updates in enumerate([1, 2, 3, 4, 5, 6, 5, 6, 7, 8], start=1):
        more = {"train/updates": float(updates)} if updates < step else {}
        lines += [training_line(step, updates * 100, 7.0, **more), {"step": step, "val/loss": 10.0 - step}]
    write_lines(tmp_path / "run/metrics.jsonl", lines)
    run = read_run(tmp_path / "run")
    assert run.curve.tokens.tolist() == [100, 200, 300, 400, 500, 600, 700, 800]
    assert run.curve.losses.tolist() == [9, 8, 7, 6, 3, 2, 1, 0]
    assert run.curve.flops[-1] == pytest.approx(8 * 7)
    assert run.curve.hours[-1] == pytest.approx(8 * SECONDS / 3600)
    assert [point.updates for point in run.points] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert run.points[5].tokens == 600


def test_the_command_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_two(tmp_path / "runs", 0.1)
    output = tmp_path / "report"
    assert invoke(["compare", str(tmp_path / "runs"), "--reference", "dense", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "dense: seeds 1, 2, 3" in printed
    row = next(line for line in printed.splitlines() if "tokens (100% and 100%)" in line)
    assert row.split()[0] == "looped"
    assert row.split()[-1] == "better"
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| model.kind | dense | looped |" in report
    assert {path.name for path in output.glob("*.png")} == {"arms.png", "curves.png"}
    numbers = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert numbers["differences"][0]["interval"]["estimate"] == pytest.approx(-0.1)
    with pytest.raises(UserError, match="--reference huge: no such group: give one of dense, looped"):
        invoke(["compare", str(tmp_path / "runs"), "--reference", "huge"])
    with pytest.raises(UserError, match="empty: no run there"):
        invoke(["compare", str(tmp_path / "empty")])
