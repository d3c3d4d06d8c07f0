"""`mythos eval` keeps every result: its file holds the settings, and only the same evaluation replaces it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.checkpoint.layout import find
from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.eval import evaluate as evaluate_module
from mythos.eval.evaluate import Evaluator, open_evaluator
from mythos.eval.measure import Wanted
from mythos.ranks.watchdog import Watchdog
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import run_training

STEPS = 4


def evaluate(config: Config) -> dict[str, float]:
    with open_evaluator(config, torch.device("cpu"), Wanted()) as evaluator:
        return losses_in(evaluator.measure(find(Path(config.run.directory), None)))


@pytest.fixture(scope="module")
def run(one_rank: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    assert one_rank.run(run_training, tiny_config("looped", tiny_data, directory, train__steps=STEPS)) == [0]
    return directory


def results(run: Path) -> dict[str, dict[str, Any]]:
    paths = RunDirectory(run).evaluations.glob("*.json")
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_every_evaluation_has_a_file_of_its_own(
    run: Path, one_rank: RankPool, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    of_version_0_1 = RunDirectory(run).evaluations / "step_00000004.json"
    of_version_0_1.parent.mkdir()
    of_version_0_1.write_text("{}", encoding="utf-8")
    other = write_data_set(tmp_path / "other", VOCABULARY, seed=1)
    settings: list[tuple[Path, dict[str, Any]]] = [
        (tiny_data, {}),
        (tiny_data, {"eval__depths": [1, 2]}),
        (tiny_data, {"eval__sequences": None}),
        (tiny_data, {"eval__exit_change": 0.5}),
        (other, {}),
    ]
    for number, (data, options) in enumerate(settings, start=1):
        config = tiny_config("looped", data, run, train__steps=STEPS, **options)
        for _ in range(2):
            (losses,) = one_rank.run(evaluate, config)
            assert len(results(run)) == 1 + number, "the same evaluation replaces its own result"
        matching = [
            result
            for result in results(run).values()
            if losses_in(result) == losses
            and result["data"]["data"]["fingerprint"] == TokenDataset(data, "validation").fingerprint
            and all(result["eval"][name.removeprefix("eval__")] == value for name, value in options.items())
        ]
        assert len(matching) == 1
        assert (matching[0]["step"], matching[0]["loop"]["mean_depth"]) == (STEPS, 3)
    assert results(run)[of_version_0_1.name] == {}
    last = next(line for line in reversed(read_metrics(run)) if "val/loss" in line)
    trained = {name: value for name, value in last.items() if name.startswith("val/")}
    assert [losses_in(result) == trained for result in results(run).values()].count(True) == 1

    otherwise = tiny_config("looped", tiny_data, run, ranks=2, train__steps=STEPS, seed=9)
    first, second = two_ranks.run(evaluate, otherwise)
    assert first == second == pytest.approx(trained, rel=1e-5), "neither ranks nor seed change the rows"


def activities(config: Config) -> list[str]:
    """What the watchdog is told during an evaluation, in order."""
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(Watchdog, "progress", lambda _, activity: told.append(activity))
        evaluate(config)
    return list(dict.fromkeys(told))


def test_every_long_phase_is_progress_for_the_watchdog(run: Path, one_rank: RankPool, tiny_data: Path) -> None:
    config = tiny_config("looped", tiny_data, run, train__steps=STEPS)
    assert one_rank.run(activities, config)[0] == [
        "building the model",
        "checking step_00000004",
        "reading step_00000004",
        "validation after step 4",
    ]


def losses_in(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if name.startswith("val/")}


def follow(run: Path, config: Config, last: Path) -> list[str]:
    """The checkpoints that are measured while the run saves two more, ``last`` and one that it removes at once."""
    first, measured, measure = find(run, None), [], Evaluator.measure
    removed = first.with_name("step_00000003")

    def measure_and_save(evaluator: Evaluator, found: Path) -> dict[str, float]:
        measured.append(found.name)
        if found == first:
            shutil.copytree(found, removed)
            shutil.move(last, first.parent)
            (first.parent / "latest").write_text(last.name, encoding="utf-8")
        if found == removed:
            shutil.rmtree(found)
        return measure(evaluator, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "measure", measure_and_save)
        patch.setattr(evaluate_module, "POLL_S", 0.01)
        with open_evaluator(config, torch.device("cpu"), Wanted()) as evaluator:
            evaluator.watch(run)
            evaluator.watch(run)
    return measured


def test_each_checkpoint_is_measured_once_until_the_run_is_complete(
    run: Path, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    """The run keeps the checkpoint before its decay, at step 2. One that it has removed meanwhile is left out."""
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))
    last = Path(shutil.move(copy / "checkpoints" / "step_00000004", tmp_path))
    (copy / "checkpoints" / "latest").write_text("step_00000002", encoding="utf-8")
    config = tiny_config("looped", tiny_data, copy, train__steps=STEPS)
    assert one_rank.run(follow, copy, config, last) == [["step_00000002", "step_00000003", "step_00000004"]]
    assert {name[:13] for name in results(copy)} == {"step_00000002", "step_00000004"}
