"""Every model of configs/model starts with every run of configs/run."""

from pathlib import Path

import pytest
import torch

from mythos.config.load import load
from mythos.engine.optimizer import build_optimizer
from mythos.engine.sections import check_clipping, deepspeed_config
from mythos.model import build_structure
from mythos.run.describe import describe
from mythos.run.status import read_status
from tests.spawn import RankPool
from tests.train.runs import run_training

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS, RUNS = (sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("model", "run"))


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_model_and_optimizer_are_built(model: Path, run: Path) -> None:
    config = load([model, run], [], 2)
    with torch.device("meta"):
        built = build_structure(config)
    groups = build_optimizer(built, config.optim).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    check_clipping(config, "bf16")
    assert deepspeed_config(config, 2, torch.device("cpu"))["gradient_accumulation_steps"] > 0


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
