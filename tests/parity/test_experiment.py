"""An experiment's file: runs, budgets, its hash, and its mistakes."""

from pathlib import Path

import pytest

from mythos.config.derive import tokens_per_step
from mythos.config.load import load
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.parity.experiment import design_hash, load_experiment, planned_runs
from mythos.parity.price import prices
from mythos.plan.cluster import load_cluster
from mythos.plan.flops import expected_steps, training_flops
from mythos.plan.plan import make_plan
from tests.cluster import REPO

FULL_RANKS = 16
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
    configs = {run.arm: run.config for run in planned}
    for run in planned:
        assert (run.config.seed, Path(run.config.run.directory)) == (run.seed, run.directory)
    tokens = {arm: config.train.steps * tokens_per_step(config) for arm, config in configs.items()}
    assert tokens["looped"] == tokens["small"] == tokens["large"]
    total = {arm: executed_flops(config, config.train.steps) for arm, config in configs.items()}
    assert 0 <= total["equal-flops"] - total["large"] < executed_flops(configs["equal-flops"]), "rounded up to a step"


def executed_flops(config: Config, steps: int = 1) -> float:
    """Of training, by the planner."""
    of_a_token = training_flops(config.model, config.data.sequence_length, expected_steps(config.loop))
    return steps * tokens_per_step(config) * of_a_token


@pytest.fixture(scope="module")
def full() -> dict[str, Config]:
    """The configuration of each arm of the experiment at full size, on two nodes of 8 GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        planned = planned_runs(load_experiment(Path("configs/parity/full.yaml")), (FULL_RANKS,))
        return {run.arm: run.config for run in reversed(planned)}


def test_the_budgets_at_full_size(full: dict[str, Config]) -> None:
    large = full["transformer-1.3b"]
    for name, config in full.items():
        spent = executed_flops(config, config.train.steps)
        match name.partition("-equal-")[2] or name.partition("-published-")[2]:
            case "tokens":
                assert config.train.steps == large.train.steps
            case "flops":
                over = spent - executed_flops(large, large.train.steps)
                assert 0 <= over < executed_flops(config), "rounded up to a step"
            case "text":
                published = full[name.removesuffix("-published-text")].train.steps
                assert 0 <= config.train.steps - 0.34 * published < 1
            case "":
                steps = {"transformer-1.3b": 198364}.get(name, 117492)  # 80 positions a parameter
                assert config.train.steps == steps
    middle, small = executed_flops(full["looped-middle"]), executed_flops(full["transformer-770m"])
    assert middle == pytest.approx(small, rel=0.002), "compute-matched"
    assert full["looped-middle"].loop is not None
    assert full["looped-middle"].loop.mean_depth == 2


@pytest.mark.parametrize("name", ["looped-770m", "transformer-770m", "transformer-1.3b"])
def test_published_arms_are_the_published_runs(
    name: str, full: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    files = [f"configs/model/{name}.yaml", "configs/recipe/parcae.yaml", f"configs/run/{name}.yaml"]
    own = ["seed=42", f"run.directory={full[name].run.directory}"]
    assert full[name] == load(files, own, FULL_RANKS)


def test_the_price_in_the_readme_is_the_planners(full: dict[str, Config]) -> None:
    cluster, seeds = load_cluster("h100"), 3
    costs = {arm: make_plan(config, FULL_RANKS, cluster).cost for arm, config in full.items()}
    three = [costs[arm] for arm in ("looped-770m", "transformer-770m", "transformer-1.3b")]
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for chosen in (list(costs.values()), three):
        hours, dollars = (seeds * sum(getattr(cost, name) for cost in chosen) for name in ("gpu_hours", "dollars"))
        shown = [f"{hours:,.0f} H100 hours", f"${dollars:,.0f}", f"{hours / FULL_RANKS / 24:.1f} days"]
        assert not [figure for figure in shown if figure not in text]


def test_the_nodes_that_a_batch_cannot_be_divided_over_are_paid_for_and_not_used(experiment_file: Path) -> None:
    changed(experiment_file, "train.steps=6", "train.micro_batch_sequences=1, train.global_batch_sequences=4")
    experiment, cluster = load_experiment(experiment_file), load_cluster("h100", ["cluster.gpus_per_node=1"])
    two, three = (prices(experiment, cluster, nodes) for nodes in (2, 3))
    assert len(two) == len(experiment.arms)
    for cheap, dear in zip(two, three, strict=True):
        assert (cheap.nodes, dear.nodes, dear.days) == (2, 2, cheap.days)
        assert dear.gpu_hours == pytest.approx(1.5 * cheap.gpu_hours)
        assert dear.dollars == pytest.approx(1.5 * cheap.dollars)


def test_references_to_the_environment(experiment_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = design_hash(load_experiment(experiment_file))
    changed(experiment_file, f"{experiment_file.parent}/runs\n", "${oc.env:PLACE}/runs\n")
    changed(experiment_file, "sequences: 4", "sequences: 4, task_data: '${oc.env:PLACE}/tasks'")
    with pytest.raises(UserError, match="directory = .*Environment variable 'PLACE' not found"):
        load_experiment(experiment_file)
    monkeypatch.setenv("PLACE", "/scratch")
    found = load_experiment(experiment_file)
    assert (found.directory, found.evaluation.task_data) == ("/scratch/runs", "/scratch/tasks")
    assert design_hash(found) == before


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
        ("flops_of: large", "share: 0.5", "budget.share = 0.5: has no effect without tokens_of or flops_of"),
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
