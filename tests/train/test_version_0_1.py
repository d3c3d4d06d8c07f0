"""Runs of version 0.1, whose directories are in version_0_1/, resume and are read by the commands.

Both were trained on two ranks for 8 of 16 steps; expected.json has the validation loss after step 8 and the losses of
the same run without an interruption. Version 0.1 validated on the first 5 rows: here the data has no others.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.export import export, load_exported
from mythos.model import depth
from mythos.model.loop import Loop, LoopState
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from tests.cluster import run
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training

DIRECTORIES = Path(__file__).parent / "version_0_1"
MYTHOS = Path(sys.executable).parent / "mythos"
TOLERANCES = {"dense-adamw": 1e-6, "published-muon": 1e-4}
"""The initial states of the looped model have other noise since then; a test below draws that of version 0.1."""
MODELS = {"dense-adamw": ("dense", "adamw", "val/loss"), "published-muon": ("published", "muon", "val/loss_depth_3")}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def directory(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DIRECTORIES / name, tmp_path / "run"))


@pytest.fixture
def expected(name: str) -> dict[str, Any]:
    return json.loads((DIRECTORIES / name / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of both runs, without the validation rows that version 0.1 did not read."""
    return write_data_set(tmp_path_factory.mktemp("data"), VOCABULARY, validation_rows=5)


def configuration(name: str, directory: Path, data: Path) -> Config:
    model, optimizer, _ = MODELS[name]
    return tiny_config(model, data, directory, ranks=2, train__steps=16, optim__kind=optimizer, eval__every=8)


def test_training_resumes(
    name: str, directory: Path, expected: dict[str, Any], two_ranks: RankPool, data: Path
) -> None:
    config = configuration(name, directory, data)
    assert two_ranks.run(run_training, config, ("data.directory",)) == [0, 0]
    losses = curve(config, "train/loss")
    assert len(losses) == 16
    if name == "dense-adamw":  # version 0.1 drew the depths of the looped model from another random stream
        assert losses == pytest.approx(expected["train_loss"], rel=1e-6)
    validated = {line["step"]: line[MODELS[name][2]] for line in read_metrics(directory) if MODELS[name][2] in line}
    assert validated[8] == pytest.approx(expected["validation_loss_at_step_8"], rel=TOLERANCES[name])
    assert set(validated) == {0, 8, 16}
    assert read_status(directory).attempts == 2
    environment = RunDirectory(DIRECTORIES / name).environment.read_bytes()
    assert RunDirectory(directory).environment.read_bytes() == environment, "it is no longer written"


def test_status_reads_it(directory: Path) -> None:
    status = read_status(directory)
    assert (status.state, status.step, status.steps, status.attempts) == ("preempted", 8, 16, 1)
    assert status.checkpoint == "step_00000008"


def test_its_weights_are_exported(directory: Path, tmp_path: Path) -> None:
    assert export(directory, tmp_path / "out").name == "step_00000008"
    assert load_exported(tmp_path / "out").state_dict()


def test_it_is_evaluated(name: str, directory: Path, expected: dict[str, Any], data: Path) -> None:
    done = run([MYTHOS, "eval", directory, f"data.directory={data}"], 200)
    assert done.returncode == 0, done.stderr
    (path,) = RunDirectory(directory).evaluations.glob("step_00000008_*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result[MODELS[name][2]] == pytest.approx(expected["validation_loss_at_step_8"], rel=TOLERANCES[name])


def test_with_the_noise_of_that_version_the_loss_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, draw_state = "published-muon", Loop._initial_state
    export(Path(shutil.copytree(DIRECTORIES / name, tmp_path / "run")), tmp_path / "out")
    expected = json.loads((DIRECTORIES / name / "expected.json").read_text(encoding="utf-8"))

    def state_of_version_0_1(loop: Loop, e_BSD: Tensor, plan: depth.DepthPlan) -> LoopState:
        h_BSD, limit, generator = torch.empty_like(e_BSD), 3 * loop.noise_deviation, torch.Generator()
        for row_SD, seed in zip(h_BSD, plan.state_seeds, strict=True):
            nn.init.trunc_normal_(row_SD, 0.0, loop.noise_deviation, -limit, limit, generator.manual_seed(seed))
        return replace(draw_state(loop, e_BSD, plan), h_BSD=h_BSD)

    monkeypatch.setattr(Loop, "_initial_state", state_of_version_0_1)
    rows = torch.from_numpy(TokenDataset(data, "validation").read(range(5)))
    with torch.no_grad():
        losses = load_exported(tmp_path / "out")(rows[:, :-1], rows[:, 1:], depth.fixed(3, 5, range(5)))
    assert float(losses.cross_entropy) == pytest.approx(expected["validation_loss_at_step_8"], rel=1e-6)
