"""Golden loss curves: a change that should not alter the numbers must leave them unchanged.

After a change that is meant to alter them, run GOLDEN=write python -m pytest tests/train/test_golden.py and give the
reason in the commit.
"""

import json
import os
from pathlib import Path

import pytest

from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, run_training

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("model", ["dense", "looped", "looped-moe", "mythos", "published"])
def test_the_loss_curve_is_the_golden_one(model: str, one_rank: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(model, tiny_data, tmp_path / "run", train__steps=20)
    assert one_rank.run(run_training, config) == [0]
    found = {name: curve(config, name) for name in ("train/loss", "train/gradient_norm")}
    path = GOLDEN / f"{model}.json"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    # The order of additions depends on the CPU's vector units; on one machine the curves are equal to the last bit.
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert found["train/gradient_norm"] == pytest.approx(expected["train/gradient_norm"], rel=1e-4)
