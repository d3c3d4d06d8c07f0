"""Experiments: one of tiny models that is only read, and the shipped smoke experiment, carried out once."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.commands import invoke
from mythos.config.load import to_dict
from mythos.config.yaml_file import dump
from mythos.parity.experiment import PlannedRun
from mythos.parity.runs import LocalRunner, log_file
from tests.cluster import REPO
from tests.data_prep.conftest import run as prepare
from tests.data_prep.conftest import source, speeches, tokenizer, write_parquet  # noqa: F401
from tests.eval.conftest import VALIDATION_PERCENT, sentences, text_config, text_data  # noqa: F401
from tests.spawn import Job

LIMIT_S = 200
SMOKE = Path("configs/parity/smoke.yaml")
SEQUENCE_LENGTH = 256
EXPERIMENT = """
name: tiny
question: Does it match?
hypothesis: Nothing is expected.
criterion: {{metric: bits_per_byte, looped: looped, small: small, large: large, margin: 0.25}}
seeds: [1, 2]
directory: {directory}
configuration: [train.steps=6, eval.every=3, checkpoint.every=2]
arms:
  looped: {{configuration: [{files}/looped.yaml]}}
  equal-flops: {{configuration: [{files}/looped.yaml], budget: {{flops_of: large}}}}
  small: {{configuration: [{files}/dense.yaml]}}
  large: {{configuration: [{files}/dense.yaml, model.layers=3]}}
evaluation: {{depths: [1, 3, 6], sequences: 4, documents: 12}}
"""


def write_experiment(data: Path, directory: Path, text: str = EXPERIMENT) -> Path:
    """The experiment's file; its runs go to ``directory``/runs."""
    directory.mkdir(exist_ok=True)
    for model in ("looped", "dense"):
        tree = to_dict(text_config(data, directory / "unused", model=model, eval__depths=None))
        for section, option in (("run", "directory"), ("eval", "depths"), ("model", "tokenizer_size")):
            tree[section].pop(option, None)
        (directory / f"{model}.yaml").write_text(dump(tree), encoding="utf-8")
    path = directory / "experiment.yaml"
    path.write_text(text.format(directory=directory / "runs", files=directory), encoding="utf-8")
    return path


@pytest.fixture
def experiment_file(text_data: Path, tmp_path: Path) -> Path:  # noqa: F811
    return write_experiment(text_data, tmp_path / "experiment")


def run_command(directory: Path, arguments: Sequence[str]) -> int:
    """A command of `mythos` in another directory."""
    os.chdir(directory)
    return main(arguments)


def in_a_fork(self: LocalRunner, run: PlannedRun, arguments: Sequence[str]) -> int:
    """The command without the seconds of its imports."""
    log = log_file(self._experiment, run).absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    return Job(1, run_command, Path.cwd(), list(arguments), output=log).wait(LIMIT_S)


@pytest.fixture(scope="session")
def workspace(sentences: list[str], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A directory like the repository's root, with less text than that of `make demo`."""
    directory = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "slurm"):
        (directory / name).symlink_to(REPO / name)
    text = write_parquet(directory / "sentences.parquet", list(sentences))
    prepare([text], tokenizer, directory / "demo/data", SEQUENCE_LENGTH, validation_percent=VALIDATION_PERCENT)
    return directory


@pytest.fixture(scope="session")
def undisturbed(workspace: Path) -> Path:
    """The directory of the smoke experiment, which was carried out by its shipped file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        patch.setattr(LocalRunner, "_command", in_a_fork)
        assert invoke(["parity", "run", str(SMOKE), "--jobs", "2"]) == 0
    return workspace / "runs/parity/smoke"


def write_smoke_experiment(directory: Path) -> Path:
    """The smoke experiment, with checkpoints, with its runs in ``directory``/runs."""
    text = (REPO / SMOKE).read_text(encoding="utf-8")
    for old, new in (
        ("directory: runs/parity/smoke\n", f"directory: {directory}/runs\n"),
        ("  - train.steps=4\n", "  - train.steps=4\n  - checkpoint.every=2\n  - checkpoint.max_failures=2\n"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = directory / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def report_of(directory: Path) -> dict[str, Any]:
    """The numbers of the report, without times."""
    report: dict[str, Any] = json.loads((directory / "report/report.json").read_text(encoding="utf-8"))
    for arm in report["arms"].values():
        for run in arm["runs"]:
            del run["device_hours"], run["curve"]["hours"], run["training_flops"], run["curve"]["flops"]
    return {"decision": report["decision"], "arms": report["arms"]}
