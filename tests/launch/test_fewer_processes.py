"""A run of two ranks, with a set of experts over both, is read by one process."""

import json
import sys
from pathlib import Path

import pytest

from mythos.export import load_exported
from mythos.run.metrics import read_metrics
from tests.cluster import run
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_training

MYTHOS = Path(sys.executable).parent / "mythos"
LIMIT_S = 100


@pytest.fixture(params=[2, None], ids=["given", "chosen"])
def trained(request: pytest.FixtureRequest, two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> Path:
    options = {"parallel__expert_parallel_size": request.param, "train__steps": 2, "train__global_batch_sequences": 8}
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, **options)
    assert two_ranks.run(run_training, config) == [0, 0]
    return tmp_path / "run"


def test_it_is_evaluated_exported_and_counted(trained: Path, tmp_path: Path) -> None:
    done = run([MYTHOS, "eval", trained], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "each set of experts is distributed over 1 rank\n" in done.stderr
    (evaluation,) = (trained / "evaluations").glob("*.json")
    found = json.loads(evaluation.read_text(encoding="utf-8"))["val/loss_depth_3"]
    of_training = [line["val/loss_depth_3"] for line in read_metrics(trained) if "val/loss_depth_3" in line]
    assert found == pytest.approx(of_training[-1], rel=1e-5)

    assert run([MYTHOS, "export", trained, "--output", tmp_path / "out"], LIMIT_S).returncode == 0
    assert load_exported(tmp_path / "out").state_dict()
    assert run([MYTHOS, "params", trained / "config.yaml"], LIMIT_S).returncode == 0
