import re
from pathlib import Path
from typing import Any

import pytest

from mythos.errors import UserError
from mythos.run.directory import STATE_FILE, RunDirectory, prepare, write_config
from tests.tiny import tiny_config


def trained_run(model: str, data: Path, run: Path) -> None:
    """The directory of a run that has written a line of metrics."""
    prepare(tiny_config(model, data, run), accept=())
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 4.5}\n', encoding="utf-8")


def test_another_configuration_in_the_same_directory_is_refused_with_the_difference(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    trained_run("looped-moe", data, run)
    before = (run / "config.yaml").read_text(encoding="utf-8")
    other = tiny_config("looped-moe", data, run, optim__learning_rate=1e-4, optim__beta1=0.8, train__steps=99)
    with pytest.raises(UserError) as error:
        prepare(other, accept=["optim.beta2", "seed", "model"])
    message = str(error.value)
    assert "  optim.learning_rate: 0.003 -> 0.0001\n" in message
    assert "train.steps" not in message, "a longer run is the same run"
    assert message.endswith("or accept the changes: --accept optim.beta1 --accept optim.learning_rate")
    with pytest.raises(UserError, match=r"accept the changes: --accept optim\.beta1$"):
        prepare(other, accept=["optim.learning_rate"])

    changed = {"optim.beta1": (0.9, 0.8), "optim.learning_rate": (0.003, 0.0001), "train.steps": (20, 99)}
    assert prepare(other, accept=["optim.learning_rate", "optim.beta1"]) == changed
    assert prepare(other, accept=["optim"]) == changed, "a section accepts all options in it"
    assert (run / "config.yaml").read_text(encoding="utf-8") == before, (
        "it is replaced only once all checks of the start have passed"
    )
    write_config(other)
    assert prepare(other, accept=()) == {}
    assert prepare(other, accept=["optim.learning_rate"]) == {}, "a requeued job, which has the same arguments"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__width": 64}, "model.width: 32 -> 64"),
        ({"model__halting": {}}, "model.halting: None -> {'ponder_weight': 0.001, 'threshold': 0.99}"),
        ({"data__sequence_length": 31}, "data.sequence_length: 15 -> 31"),
    ],
)
def test_options_that_the_state_depends_on_never_change(tmp_path: Path, overrides: dict[str, Any], line: str) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    trained_run("looped-moe", data, run)
    option = line.split(":")[0]
    with pytest.raises(UserError, match=f"{line}\nChoose another run.directory: a run keeps its {option}"):
        prepare(tiny_config("looped-moe", data, run, **overrides), accept=[option])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"train__global_batch_sequences": 16}, "train.global_batch_sequences: 8 -> 16"),
        ({"model__core_experts__balance_rate": 0.01}, "model.core_experts.balance_rate: 0.001 -> 0.01"),
        ({"model__core_experts__balance_loss": 0.1}, "model.core_experts.balance_loss: 0.0 -> 0.1"),
        ({"model__core_experts__router_z_loss": 0.1}, "model.core_experts.router_z_loss: 0.0 -> 0.1"),
        ({"data__shuffle_shards": 4}, "data.shuffle_shards: 32 -> 4"),
        ({"optim__kind": "muon"}, "optim.kind: 'adamw' -> 'muon'"),
    ],
)
def test_options_that_change_the_run_need_consent(tmp_path: Path, overrides: dict[str, Any], line: str) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    trained_run("looped-moe", data, run)
    changed, option = tiny_config("looped-moe", data, run, **overrides), line.split(":")[0]
    with pytest.raises(UserError, match=f"{line}\n.*accept the changes: --accept {option}$"):
        prepare(changed, accept=())
    assert option in prepare(changed, accept=[option])


def saved_at(step: int, data: Path, run: Path, **options: Any) -> None:
    """The directory of a run with a checkpoint of this step."""
    prepare(tiny_config("dense", data, run, **options), accept=())
    checkpoint = RunDirectory(run).checkpoints / f"step_{step:08d}"
    checkpoint.mkdir()
    (checkpoint / STATE_FILE).write_text(f'{{"step": {step}}}', encoding="utf-8")
    RunDirectory(run).latest.write_text(checkpoint.name, encoding="utf-8")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_longer_run_that_raises_the_learning_rate_again_needs_consent(tmp_path: Path, kind: str) -> None:
    data, run, of_kind = tmp_path / "data", tmp_path / "run", {"optim__kind": kind}
    saved_at(20, data, run, **of_kind)  # finished: the rate fell over the last 10 steps
    longer = tiny_config("dense", data, run, train__steps=40, **of_kind)
    with pytest.raises(UserError) as error:
        prepare(longer, accept=())
    line, rate = "train.steps: 20 -> 40", r"learning rate at step 20: 0.0003 -> 0.003"
    assert re.search(rf"\n  {line}\n  {rate}\n.*accept the changes: --accept train.steps$", str(error.value))
    assert list(prepare(longer, accept=["train.steps"])) == ["train.steps", "learning rate at step 20"]


@pytest.mark.parametrize(
    ("done", "options"),
    [
        (5, {"train__steps": 40}),  # constant under both
        (15, {"train__steps": 10}),  # no step is left
        (20, {"train__steps": 40, "optim__cooldown": "constant"}),
    ],
)
def test_another_length_with_the_same_learning_rate_is_free(tmp_path: Path, done: int, options: dict[str, Any]) -> None:
    cooldown = {name: value for name, value in options.items() if name != "train__steps"}
    saved_at(done, tmp_path / "data", tmp_path / "run", **cooldown)
    changed = prepare(tiny_config("dense", tmp_path / "data", tmp_path / "run", **options), accept=())
    assert list(changed) == ["train.steps"]


@pytest.mark.parametrize(
    ("option", "value", "rate"),
    [
        ("cooldown_fraction", 0.25, 0.003),
        ("final_learning_rate_fraction", 0.5, 0.00225),
        ("learning_rate", 1e-3, 0.0005),
        ("warmup_steps", 32, 0.00075),
        ("cooldown", "constant", 0.003),
    ],
)
def test_a_change_of_the_schedule_shows_the_learning_rate_that_follows(
    tmp_path: Path, option: str, value: Any, rate: float
) -> None:
    saved_at(15, tmp_path / "data", tmp_path / "run")
    changed = tiny_config("dense", tmp_path / "data", tmp_path / "run", **{f"optim__{option}": value})
    with pytest.raises(UserError, match="learning rate at step 16: 0.0015 -> "):
        prepare(changed, accept=())
    assert prepare(changed, accept=["optim"])["learning rate at step 16"] == (0.0015, pytest.approx(rate))


@pytest.mark.parametrize("trace", ["nothing", "metrics", "checkpoint"])
def test_only_a_run_that_has_trained_keeps_its_configuration(
    tmp_path: Path, trace: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept=())
    if trace == "metrics":
        (run / "metrics.jsonl").write_text('{"step": 0, "val/loss": 4.5}\n', encoding="utf-8")
    elif trace == "checkpoint":
        (run / "checkpoints" / "step_00000001").mkdir()
    other = tiny_config("dense", data, run)
    if trace == "nothing":
        with caplog.at_level("INFO", "mythos"):
            assert "model.kind" in prepare(other, accept=())
        assert "no checkpoint and no metrics yet" in caplog.text
    else:
        with pytest.raises(UserError, match="model.kind: 'looped' -> 'dense'"):
            prepare(other, accept=())


@pytest.mark.parametrize("content", ["", "train: 5", "a: [", "\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    config = tiny_config("looped", tmp_path / "data", tmp_path / "run")
    prepare(config, accept=())
    (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.yaml: damaged"):
        prepare(config, accept=())


def test_options_without_effect_on_the_numbers_may_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained_run("looped-moe", tmp_path / "data", run)
    moved = tiny_config(
        "looped-moe", tmp_path / "moved", run, checkpoint__every=7, eval__every=3, loop__recompute=False
    )
    assert set(prepare(moved, accept=())) == {
        "data.directory",
        "checkpoint.every",
        "eval.every",
        "loop.recompute",
    }


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="not empty and not a run"):
        prepare(tiny_config("looped", tmp_path / "data", tmp_path), accept=())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="run.directory = .*file/run.*choose a directory that can be written"):
        prepare(tiny_config("looped", tmp_path / "data", tmp_path / "file" / "run"), accept=())


def test_a_run_of_version_0_1_shows_no_change_that_nobody_made(tmp_path: Path) -> None:
    saved = Path(__file__).parents[1] / "train" / "version_0_1"
    for name, model, kind in (("dense-adamw", "dense", "adamw"), ("published-muon", "published", "muon")):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_bytes((saved / name / "config.yaml").read_bytes())
        config = tiny_config(model, tmp_path, run, ranks=2, train__steps=16, optim__kind=kind)
        assert {path for path in prepare(config, accept=()) if path.startswith("optim.")} == set()


def test_an_unfinished_save_is_no_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(tiny_config("dense", tmp_path, run), accept=())
    (run / "checkpoints" / "step_00000008.partial").mkdir()
    other = tiny_config("dense", tmp_path, run, optim__learning_rate=1e-4)
    assert set(prepare(other, accept=())) == {"optim.learning_rate"}
    (run / "checkpoints" / "step_00000004").mkdir()
    with pytest.raises(UserError, match="holds a run with another configuration"):
        prepare(other, accept=())
