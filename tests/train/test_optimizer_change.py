"""A run that is resumed with another ``optim.kind``."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, failure, run_training
from tests.train.test_resume import EXACT, as_if_killed_after

FIRST, STEPS, SAVED = 4, 10, 8


def state_names(checkpoint: Path) -> dict[str, set[str]]:
    """The state tensors of each parameter in a checkpoint."""
    names: dict[str, set[str]] = {}
    for path in checkpoint.glob("optimizer_*.safetensors"):
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                parameter, _, state = key.rpartition(".")
                names.setdefault(parameter, set()).add(state)
    return names


@pytest.mark.parametrize(
    ("before", "after", "stage"),
    [("muon", "adamw", 3), ("adamw", "muon", 3), ("muon", "adamw", 0), ("adamw", "muon", 2)],
)
def test_it_keeps_the_moments_that_both_kinds_have(
    before: str, after: str, stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "train__steps": STEPS,
        "parallel__zero_stage": stage,
        "checkpoint__every": 2,
        "checkpoint__keep_last": 5,
        "optim__cooldown": "constant",
    }
    run = tmp_path / "run"
    kinds: dict[str, dict[str, Any]] = {"adamw": {}, "muon": {"optim__kind": "muon", "optim__muon_beta2": 0.95}}
    straight = tiny_config("looped-moe", tiny_data, tmp_path / "straight", 2, **kinds[before], **options)
    assert two_ranks.run(run_training, straight) == [0, 0]
    as_if_killed_after(straight, FIRST, run)
    written = (run / "config.yaml").read_text(encoding="utf-8")

    changed = tiny_config("looped-moe", tiny_data, run, 2, **kinds[after], **options)
    assert f"optim.kind: '{before}' -> '{after}'" in two_ranks.run(failure, changed)[0]
    assert (run / "config.yaml").read_text(encoding="utf-8") == written, "a refused start changes nothing"
    assert two_ranks.run(run_training, changed, ("optim.kind",)) == [0, 0]
    log = (run / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert log.count("step_00000004 was written with another optim.kind") == 1
    losses = curve(changed, "train/loss")
    assert losses[:FIRST] == curve(straight, "train/loss")[:FIRST]
    assert losses == pytest.approx(curve(straight, "train/loss"), abs=0.03), "the new kind's first updates do no harm"

    names = state_names(run / "checkpoints" / "step_00000010")
    of_muon = {"exp_avg", "second_moment"}
    assert all(states in (of_muon, {"exp_avg", "exp_avg_sq"}) for states in names.values())
    assert any(states == of_muon for states in names.values()) == (after == "muon"), (
        "no state that the new kind does not read"
    )

    resumed = as_if_killed_after(changed, SAVED, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    for name in EXACT:
        assert curve(resumed, name) == curve(changed, name), name
