"""An experiment of tiny models on real text, whose files lie in a directory of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.commands import invoke
from mythos.config.load import to_dict
from mythos.config.yaml_file import dump
from mythos.parity.experiment import PlannedRun
from mythos.parity.runs import LocalRunner
from tests.data_prep.conftest import source, speeches, tokenizer  # noqa: F401
from tests.eval.conftest import sentences, text_config, text_data  # noqa: F401
from tests.spawn import Job

LIMIT_S = 200
EXPERIMENT = """
name: tiny
question: Does it match?
hypothesis: Nothing is expected.
criterion: {{metric: bits_per_byte, looped: looped, small: small, large: large, margin: 0.25}}
seeds: [1, 2]
directory: {directory}
configuration: [train.steps=6, eval.every=3, checkpoint.every=2, checkpoint.max_failures=2]
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


def in_a_fork(self: LocalRunner, run: PlannedRun, arguments: Sequence[str]) -> int:
    """The command without the seconds of its imports."""
    log = Path(self._experiment.directory) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    return Job(1, main, list(arguments), output=log).wait(LIMIT_S)


@pytest.fixture(scope="session")
def undisturbed(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An experiment that was carried out."""
    path = write_experiment(text_data, tmp_path_factory.mktemp("undisturbed") / "experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalRunner, "_command", in_a_fork)
        assert invoke(["parity", "run", str(path), "--jobs", "2"]) == 0
    return path


def report_of(path: Path) -> dict[str, Any]:
    """The report without times."""
    text = (path.parent / "runs/report/report.json").read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads(text)
    for arm in report["arms"].values():
        for run in arm["runs"]:
            del run["device_hours"], run["curve"]["hours"], run["training_flops"], run["curve"]["flops"]
    return report
