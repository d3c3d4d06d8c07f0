"""An experiment's file: runs, budgets, its hash, and its mistakes."""

from pathlib import Path

import pytest

from mythos.config.derive import tokens_per_step
from mythos.errors import UserError
from mythos.parity.experiment import design_hash, load_experiment, planned_runs
from mythos.plan.flops import expected_steps, training_flops
from tests.cluster import REPO

SHIPPED = sorted((REPO / "configs/parity").glob("*.yaml"))


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_experiment_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    experiment = load_experiment(path)
    planned = planned_runs(experiment)
    assert len(planned) == len(experiment.arms) * len(experiment.seeds)
    assert len({run.directory for run in planned}) == len(planned)


def test_every_arm_has_every_seed_and_its_budget(experiment_file: Path) -> None:
    planned = planned_runs(load_experiment(experiment_file))
    assert [(run.arm, run.seed) for run in planned[:4]] == [(a, 1) for a in ("looped", "equal-flops", "small", "large")]
    spent = {}
    for run in planned:
        config = run.config
        assert (config.seed, Path(config.run.directory)) == (run.seed, run.directory)
        flops = training_flops(config.model, config.data.sequence_length, expected_steps(config.loop))
        spent[run.arm] = (config.train.steps * tokens_per_step(config), config.train.steps * flops)
    assert spent["looped"][0] == spent["small"][0] == spent["large"][0]
    of_a_step = {run.arm: spent[run.arm][1] * tokens_per_step(run.config) / run.config.train.steps for run in planned}
    total = {run.arm: of_a_step[run.arm] * run.config.train.steps for run in planned}
    assert 0 <= total["equal-flops"] - total["large"] < of_a_step["equal-flops"], "rounded up to a step"


def test_the_hash_is_that_of_the_design_and_not_of_the_place(experiment_file: Path) -> None:
    before = design_hash(load_experiment(experiment_file))
    assert design_hash(load_experiment(changed(experiment_file, "/runs\n", "/elsewhere\n"))) == before
    hashes = {before}
    for old, new in (
        ("margin: 0.25", "margin: 0.5"),
        ("Nothing is expected", "It matches"),
        ("seeds: [1, 2]", "seeds: [1, 2, 3]"),
        ("train.steps=6", "train.steps=7"),
        ("model.layers=3", "model.layers=4"),
    ):
        hashes.add(design_hash(load_experiment(changed(experiment_file, old, new))))
    changed(experiment_file.parent / "dense.yaml", "width: 32", "width: 64")
    hashes.add(design_hash(load_experiment(experiment_file)))
    assert len(hashes) == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("large: large", "large: huge", "criterion.large = 'huge': no such arm: give one of looped, equal-flops"),
        ("flops_of: large", "flops_of: huge", "arms.equal-flops.budget = 'huge': no such arm"),
        ("flops_of: large", "flops_of: large, tokens: 5", "give one of tokens, tokens_of and flops_of"),
        ("flops_of: large", "flops_of: equal-flops", "its budget is that of another arm: name that one"),
        ("margin: 0.25", "margin: 2", "criterion.margin = '2'"),
        ("seeds: [1, 2]", "seeds: []", "seeds = "),
        ("train.steps=6", "train.stepz=6", r"arm looped: 1 problem in the configuration:\n  train.stepz = 6"),
        ("name: tiny", "name: ../tiny", "name = '../tiny'"),
    ],
)
def test_mistakes_are_named(experiment_file: Path, old: str, new: str, message: str) -> None:
    changed(experiment_file, old, new)
    with pytest.raises(UserError, match=message):
        planned_runs(load_experiment(experiment_file))
