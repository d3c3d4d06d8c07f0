"""The reports under docs/parity-*: they follow from the runs that are beside them, by this code."""

import json
import tarfile
from pathlib import Path

import pytest

from mythos.parity.experiment import load_experiment, planned_runs
from mythos.parity.report import write_report
from tests.cluster import REPO

PUBLISHED = sorted(REPO.glob("docs/parity-*"))


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.name)
def test_the_report_is_that_of_the_runs(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(published / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    beside = {"README.md", "runs.tar.xz"}
    file = Path("configs/parity", published.name.removeprefix("parity-")).with_suffix(".yaml")
    if not file.exists():
        file = published / "experiment.yaml"
        beside.add(file.name)
    experiment = load_experiment(file)
    report = write_report(experiment, planned_runs(experiment), tmp_path / "report")
    assert report.read_text(encoding="utf-8") == (published / "report.md").read_text(encoding="utf-8")
    assert {path.name for path in report.parent.iterdir()} | beside == {path.name for path in published.iterdir()}
    answers = [
        json.loads((directory / "report.json").read_text(encoding="utf-8"))["decision"]
        for directory in (report.parent, published)
    ]
    assert answers[0]["answer"] == answers[1]["answer"]
    assert "was changed after the first run" not in report.read_text(encoding="utf-8")
    assert "## Missing" not in report.read_text(encoding="utf-8")
