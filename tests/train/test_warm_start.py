"""A new run that starts from the weights of another one, or of exported ones."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.checkpoint import layout, restore
from mythos.checkpoint.initial import load_initial_weights, matching
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import DONE, UserError
from mythos.export import export
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import failure, run_training

EXPERTS = {"parallel__expert_parallel_size": 2}


@pytest.fixture(scope="module")
def before(two_ranks: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, with experts, and its exported weights beside it."""
    run = tmp_path_factory.mktemp("before") / "run"
    config = tiny_config("mythos", tiny_data, run, ranks=2, train__steps=4, **EXPERTS)
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    export(run, run.with_name("exported"))
    return run


def state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """The weights of this rank's elements, and the buffers."""
    shards = {s.name: s.weights(s.start, s.stop).clone() for s in engine.shards()}
    return shards | {name: buffer.clone() for name, buffer in engine.buffers().items()}


def started(config: Config, saved: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """State of a new engine with initial weights and of one that resumes; number of the first one's moments."""
    engine = TrainingEngine(config, torch.device("cpu"))
    load_initial_weights(engine, config.train, restore.unwatched)
    own, moments = state(engine), len(engine.optimizer.state)
    restore.load(engine, saved)
    return own, state(engine), moments


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step_00000002", "exported"])
def test_all_weights_and_nothing_else(
    source: str, before: Path, one_rank: RankPool, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    checkpoint = RunDirectory(before).checkpoints / layout.tag(2 if "2" in source else 4)
    for pool, options in ((one_rank, {"parallel__zero_stage": 0}), (two_ranks, EXPERTS)):
        weights = {"train__initial_weights": str(before.parent / source)}
        config = tiny_config("mythos", tiny_data, tmp_path, ranks=pool.ranks, **options, **weights)
        for own, resumed, moments in pool.run(started, config, checkpoint):
            assert own.keys() == resumed.keys()
            assert all(torch.equal(own[name], resumed[name]) for name in own)
            assert any(buffer.any() for name, buffer in own.items() if name.endswith("e_score_correction_bias"))
            assert moments == 0


def loss_at_start(run: Path) -> float:
    return next(line["val/loss"] for line in read_metrics(run) if line["step"] == 0)


def test_a_run_with_other_data_optimizer_and_depth(
    before: Path, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    other = write_data_set(tmp_path / "other", VOCABULARY, seed=3)
    options: dict[str, Any] = {"ranks": 2, "train__steps": 2, "optim__kind": "muon", "loop__mean_depth": 2.0}
    options["train__initial_weights"] = str(before)
    config = tiny_config("mythos", other, tmp_path / "run", **options)
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    same = tiny_config(
        "mythos", tiny_data, tmp_path / "same", **options | {"optim__kind": "adamw", "loop__mean_depth": 3}
    )
    assert two_ranks.run(run_training, same) == [DONE, DONE]
    last = [line["val/loss"] for line in read_metrics(before) if "val/loss" in line][-1]
    assert loss_at_start(tmp_path / "same") == last
    # A second start resumes the run: its initial weights may be gone.
    gone = tiny_config(
        "mythos", other, tmp_path / "run", **options | {"train__initial_weights": str(tmp_path / "gone")}
    )
    assert two_ranks.run(run_training, gone, ("train.initial_weights",)) == [DONE, DONE]


def test_a_part_that_is_left_out_is_fresh_and_reported(
    before: Path, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = {"train__initial_weights": str(before), "train__initial_weights_without": ["coda", "*.experts"]}
    config = tiny_config("mythos", tiny_data, tmp_path / "run", train__steps=1, **options)
    assert one_rank.run(run_training, config) == [DONE]
    log = (tmp_path / "run/log/rank_00000.log").read_text(encoding="utf-8")
    fresh = re.search(r"parameters with fresh weights: (.*)", log)
    unused = re.search(r"of step_00000004 that are not used: (.*)", log)
    assert fresh
    assert unused
    assert fresh[1] == unused[1]
    assert fresh[1].startswith("coda.0.attention.")
    deeper = {"train__initial_weights": str(before), "model__prelude_layers": 2, "train__steps": 1}
    assert one_rank.run(run_training, tiny_config("mythos", tiny_data, tmp_path / "deeper", **deeper)) == [DONE]
    log = (tmp_path / "deeper/log/rank_00000.log").read_text(encoding="utf-8")
    assert "parameters with fresh weights: prelude.1.attention." in log
    assert "not used" not in log
    newer = {"model__core_experts__router_bias_per_loop": 2, "model__injection": "lti_exact", "train__steps": 1}
    newer |= {"model__residual_scaling": "loops", "train__initial_weights": str(before)}
    assert one_rank.run(run_training, tiny_config("mythos", tiny_data, tmp_path / "newer", **newer)) == [DONE]
    log = (tmp_path / "newer/log/rank_00000.log").read_text(encoding="utf-8")
    biases = [f"loop.core.{n}.router_bias.weight" for n in (0, 1)]
    assert f"parameters with fresh weights: {', '.join(biases)}\n" in log
    assert "not used" not in log


def test_weights_that_do_not_fit_are_one_line(
    before: Path, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    wider = tiny_config(
        "mythos", tiny_data, tmp_path / "a", train__initial_weights=str(before), model__vocabulary_size=128
    )
    [message] = one_rank.run(failure, wider)
    assert re.fullmatch(
        r"train.initial_weights: (\S+) has the shape \[96, 32\] there and \[128, 32\] here: choose the same model, or "
        r"leave it out: train.initial_weights_without=\[\1\]",
        message,
    )
    nowhere = tiny_config("mythos", tiny_data, tmp_path / "b", train__initial_weights=str(tmp_path))
    [message] = one_rank.run(failure, nowhere)
    assert message.endswith(": give a run directory, one of its checkpoints, or exported weights")


def test_names_that_match() -> None:
    own = {"head.weight": (2,), "core.0.up.weight": (3,), "core.1.up.weight": (3,)}
    theirs = {"core.0.up.weight": (3,), "head.weight": (4,), "tail": (1,)}
    assert matching(own, theirs, ["head"]) == ["core.0.up.weight"]
    with pytest.raises(UserError, match="head.weight has the shape"):
        matching(own, theirs, [])
    with pytest.raises(UserError, match="initial_weights_without = 'hea': no parameter has this name"):
        matching(own, theirs, ["hea"])
    with pytest.raises(UserError, match="no parameter of the model is in it"):
        matching(own, theirs, ["*"])
