"""Every model of configs/model starts with every run of configs/run and every recipe of configs/recipe."""

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mythos.config.derive import expert_parallel_size, global_batch_sequences, tokens_per_step
from mythos.config.load import load
from mythos.config.model_schema import Looped
from mythos.config.optim_schema import Muon
from mythos.config.schema import Config
from mythos.engine.optimizer import build_optimizer
from mythos.engine.sections import deepspeed_config
from mythos.model import build_structure
from mythos.plan.flops import expected_steps
from mythos.plan.params import count_parameters
from mythos.plan.schedule import learning_rate, schedule
from mythos.run.describe import describe
from mythos.run.status import read_status
from tests.spawn import RankPool
from tests.train.runs import run_training

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS, RUNS, RECIPES = (sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("model", "run", "recipe"))


@lru_cache
def structure(model: Path) -> nn.Module:
    """The model without memory for its weights; the run file has no influence on it."""
    with torch.device("meta"):
        return build_structure(load([model, CONFIGS / "run" / "demo.yaml"], [], 2))


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_model_and_optimizer_are_built(model: Path, run: Path) -> None:
    config = load([model, run], [], 2)
    built = structure(model)
    groups = build_optimizer(built, config.optim).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    assert deepspeed_config(config, 2, torch.device("cpu"))["gradient_accumulation_steps"] > 0


# Tokens in billions, and the learning rate of AdamW (arXiv 2604.12946); all else is the same for all.
PUBLISHED = {"140m": (11.2, 8e-3), "370m": (29.6, 8e-3), "770m": (61.6, 6e-3), "1.3b": (104, 6e-3)}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("kind", ["looped", "transformer"])
def test_each_published_model_has_a_run_with_the_published_recipe(kind: str, size: str) -> None:
    name = f"{kind}-{size}"
    config = load([CONFIGS / "model" / f"{name}.yaml", CONFIGS / "run" / f"{name}.yaml"], [], 8)
    billions, rate = PUBLISHED[size]
    steps, optim = config.train.steps, config.optim
    assert steps == int(billions * 1e9 / 524_288)
    assert (global_batch_sequences(config), tokens_per_step(config)) == (256, 524_288)
    assert isinstance(optim, Muon)
    assert (optim.beta1, optim.beta2, optim.epsilon, optim.gradient_clip) == (0.8, 0.95, 1e-10, 1.0)
    # No warm-up, constant, then linear to 0 over the last half; Muon's momentum rises over 300 steps, its decay falls.
    rates = [learning_rate(optim, step, steps) for step in (0, steps // 2 - 1, steps * 3 // 4, steps - 1)]
    assert rates == pytest.approx([rate, rate, rate / 2, 0], rel=1e-3, abs=3 * rate / steps)
    first, later = (schedule(optim, step, steps)["matrices"] for step in (0, 300))
    assert (first["lr"], later["lr"]) == (8e-3, 8e-3)
    assert (first["momentum"], later["momentum"]) == (0.85, 0.95)
    assert first["weight_decay"] == 0.2
    assert Path(config.run.directory).name == name


def test_the_documents_say_what_the_layouts_of_the_flagship_send() -> None:
    """ZeRO-3 gathers weights and reduces gradients, once each; ZeRO-2 reduces, and gathers after the update.

    Gradients are fp32, and the token table as ZeRO-3 gathers it; the rest is bf16.
    """
    config = load([CONFIGS / "model" / "looped-moe-770m.yaml", CONFIGS / "run" / "pretrain.yaml"], [], 16)
    model, loop = config.model, config.loop
    assert isinstance(model, Looped)
    assert model.core_experts is not None
    assert loop is not None
    experts = count_parameters(model).parts["routed experts"]
    others = count_parameters(model).total - experts
    table = model.vocabulary_size * model.width
    routed = config.train.micro_batch_sequences * config.data.sequence_length * model.core_experts.experts_per_token
    # To the experts and back: forward at every loop step, backward at those with gradient; nothing is recomputed.
    steps = expected_steps(loop)
    exchanges = 2 * model.core_layers * (steps.without_grad + 2 * steps.with_grad)

    def row(size: int) -> str:
        own = others + experts / size
        weights = (2 * (own - table) + 4 * table + 4 * own) / 1e9
        tokens = 2 * exchanges * routed * model.width * (1 - 1 / size) / 1e9
        return f"| {weights:.1f} GB | {f'{tokens:.1f} GB' if tokens else '0'} |"

    gradients, weights = 4 * (others + experts) / 1e9, 2 * (others + experts) / 1e9
    zero_2 = f"| {gradients + weights:.1f} GB, of which {weights:.1f} GB after the update | 0 |"
    expected = [row(expert_parallel_size(config, ["a"] * 8 + ["b"] * 8)), row(8), row(1), zero_2]
    text = (CONFIGS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.startswith("| `") and "parallel_size" in line]
    assert [line.endswith(end) for line, end in zip(found, expected, strict=True)] == [True] * 4, (found, expected)
    readme = " ".join((CONFIGS.parent / "README.md").read_text(encoding="utf-8").split())
    in_all = sum(float(number) for number in re.findall(r"[0-9.]+(?= GB)", expected[0]))
    for number in (in_all, gradients + weights):
        assert f" {number:.1f} GB" in readme


@pytest.mark.parametrize(
    "model", [path for path in MODELS if path.stem.startswith("tiny-")], ids=lambda path: path.stem
)
def test_the_tiny_models_train_with_the_run_of_the_demo(
    model: Path, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    of_the_tests = [f"data.directory={tiny_data}", "data.sequence_length=15", f"run.directory={tmp_path / 'run'}"]
    short = ["train.steps=1", "eval.sequences=2", "sample.tokens=0"]
    config = load([model, CONFIGS / "run" / "demo.yaml"], [*of_the_tests, *short], 2)
    assert two_ranks.run(run_training, config) == [0, 0]
    size = 2 if "core_experts" in model.read_text(encoding="utf-8") else 1
    assert describe(read_status(tmp_path / "run"))["ranks"] == f"2, expert-parallel size {size}"


def with_recipe(model: str, recipe: Path, run: Path) -> list[Path]:
    """The files as they are given; `parcae-paper-start` comes after `parcae`."""
    before = [CONFIGS / "recipe" / "parcae.yaml"] if recipe.stem == "parcae-paper-start" else []
    return [CONFIGS / "model" / f"{model}.yaml", *before, recipe, run]


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_and_run_has_a_clean_configuration(recipe: Path, run: Path) -> None:
    """``load`` is what `mythos config` does; it raises an error for every finding."""
    model = run.stem if (CONFIGS / "model" / run.name).exists() else "looped-770m"
    for ranks in (1, 2, 4):
        of_two_processes = run.stem == "demo" and ranks > 2  # whose batch has two micro batches
        smaller = ["train.micro_batch_sequences=8"] if of_two_processes else []
        config = load(with_recipe(model, recipe, run), smaller, ranks)
        assert config.optim.kind == "muon"


KINDS = {
    "looped-140m": [*(f"model.{part}_layers=1" for part in ("prelude", "core", "coda")), "eval.depths=[2]"],
    "transformer-140m": ["model.layers=2"],
}
SMALL = [
    *("model.vocabulary_size=96", "model.width=32", "model.feed_forward.hidden_size=64"),
    *("model.attention.heads=2", "model.attention.kv_heads=2", "model.attention.head_size=16"),
    *("train.steps=1", "train.global_batch_tokens=60", "train.micro_batch_sequences=1"),
    *("data.sequence_length=15", "eval.sequences=2", "sample.tokens=0"),
]
"""Overrides of size only."""


def train_each(configs: list[Config]) -> list[int]:
    return [run_training(config) for config in configs]


@pytest.mark.parametrize("pool", ["one_rank", "two_ranks", "four_ranks"])
def test_every_recipe_starts_at_every_stage(
    pool: str, request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path
) -> None:
    """The two kinds of model alternate, so that each recipe trains both on every number of ranks."""
    ranks: RankPool = request.getfixturevalue(pool)
    configs = []
    for number, recipe in enumerate(RECIPES):
        for stage in range(4):
            model = list(KINDS)[(number + stage) % 2]
            run = CONFIGS / "run" / f"{model}.yaml"
            own = [f"parallel.zero_stage={stage}", f"run.directory={tmp_path}/{recipe.stem}-{stage}"]
            overrides = [*SMALL, *KINDS[model], f"data.directory={tiny_data}", "perf.peak_flops_per_second=5e10", *own]
            configs.append(load(with_recipe(model, recipe, run), overrides, ranks.ranks))
    assert ranks.run(train_each, configs) == [[0] * len(configs)] * ranks.ranks
    assert {read_status(Path(config.run.directory)).step for config in configs} == {1}
