"""Recipes from their files: the published one against a trainer that follows the paper alone; all on any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mythos.config.derive import global_batch_sequences
from mythos.config.load import load
from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.model import build_model, depth
from tests.reference.published import Shape, train_as_published
from tests.spawn import RankPool
from tests.tiny import MODELS, SEQUENCE_LENGTH
from tests.train.runs import curve, run_training

RECIPES = Path(__file__).parents[2] / "configs" / "recipe"
STEPS, RATE = 20, 6e-3
ATTENTION = MODELS["published"]["model"]["attention"]
KINDS: dict[str, tuple[dict[str, Any], Shape]] = {
    "looped": (MODELS["published"] | {"loop": {"mean_depth": 4, "backprop_depth": 4}}, Shape(2, 1, 2, 1)),
    "dense": ({"model": MODELS["dense"]["model"] | {"attention": ATTENTION, "layers": 4}}, Shape(2, 4)),
}


def recipe_config(
    model: dict[str, Any], recipe: str, data: Path, directory: Path, ranks: int, stage: int, steps: int = STEPS
) -> Config:
    """The model with the recipe's file, and a run that gives only what the recipe leaves to it."""
    run = {
        "run": {"directory": str(directory / "run")},
        "device": "cpu",
        "train": {"steps": steps, "global_batch_sequences": 8, "micro_batch_sequences": 8 // ranks},
        "optim": {"learning_rate": RATE},
        "parallel": {"zero_stage": stage},
        "eval": {"every": 1000, "sequences": 5},
        "data": {"directory": str(data), "sequence_length": SEQUENCE_LENGTH},
    }
    files = {"model": model, "run": run}
    for name, tree in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load([directory / "model.yaml", RECIPES / f"{recipe}.yaml", directory / "run.yaml"], [], ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_recipe_trains_as_the_paper_says(
    kind: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    model, shape = KINDS[kind]
    config = recipe_config(model, "parcae", tiny_data, tmp_path, 2, 2)
    assert two_ranks.run(run_training, config) == [0, 0]

    stream = TokenStream([Source("data", 1.0, TokenDataset(tiny_data, "train"))], 42, config.data.shuffle_shards)
    count = global_batch_sequences(config)
    samples = [range(step * count, (step + 1) * count) for step in range(STEPS)]
    batches = [torch.from_numpy(stream.rows(numbers.start, count)) for numbers in samples]
    depths = [[0] * count] * STEPS
    if config.loop is not None:
        depths = [
            depth.draw_depths(config.loop, 42, step + 1, numbers).tolist() for step, numbers in enumerate(samples)
        ]
        assert len({each for step in depths for each in step}) > 6
    seeds = [[depth.state_seed(42, sample) for sample in numbers] for numbers in samples]
    weights = dict(build_model(config).named_parameters())
    expected, _ = train_as_published(weights, shape, batches, depths, seeds, RATE)
    assert curve(config, "train/loss") == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3, "the loss falls"


@pytest.mark.parametrize(
    ("recipe", "layouts"),
    [
        # ranks and ZeRO stage
        ("parcae", [(1, 0), (2, 1), (2, 2), (4, 3)]),
        ("mythos", [(4, 1), (1, 3)]),
        ("parcae-paper-start", [(2, 3), (4, 0)]),
    ],
)
def test_a_recipe_starts_with_the_same_losses_on_every_layout(
    recipe: str,
    layouts: list[tuple[int, int]],
    one_rank: RankPool,
    two_ranks: RankPool,
    four_ranks: RankPool,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}
    curves = []
    for ranks, stage in layouts:
        directory = tmp_path / f"{ranks}-{stage}"
        directory.mkdir()
        config = recipe_config(KINDS["looped"][0], recipe, tiny_data, directory, ranks, stage, steps=2)
        assert set(pools[ranks].run(run_training, config)) == {0}
        curves.append(curve(config, "train/loss"))
    assert len(curves[0]) == 2
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-5)
