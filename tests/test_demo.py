"""`make demo` as a newcomer runs it, from text to a trained model, but with fewer steps; and a second start of it."""

import sys
from pathlib import Path

import pytest

from mythos.run.metrics import read_metrics
from tests.cluster import REPO, clean_environment, run
from tests.require import missing

STEPS = 40


@pytest.mark.timeout(1800)
def test_the_demo_learns_and_a_second_start_says_that_it_is_finished(tmp_path: Path) -> None:
    if not Path(sys.prefix, ".installed").exists():
        missing("this environment was not created by `make setup`")
    directory = tmp_path / "run"
    command = ["make", "demo", f"VENV={sys.prefix}", f"DEMO_DATA={tmp_path / 'data'}", f"DEMO_RUN={directory}"]
    command.append(f"DEMO_STEPS={STEPS}")
    environ = {name: value for name, value in clean_environment().items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = run(command, limit_s=1500, env=environ, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert 'sample: "My fellow citizens, the state of the Union' in done.stderr
    assert f"run directory: {directory}" in done.stderr
    assert f"tensorboard --logdir {directory}" in done.stderr

    lines = read_metrics(directory)
    validations = [line for line in lines if "val/loss_depth_8" in line]
    first, last = validations[0], validations[-1]
    assert {f"val/loss_depth_{depth}" for depth in (1, 2, 4, 8)} <= last.keys()
    assert last["val/loss"] == last["val/loss_depth_4"]
    assert last["val/loss_depth_8"] < 0.72 * first["val/loss_depth_8"]
    assert last["val/loss_depth_8"] < last["val/loss_depth_1"]

    again = run(command, limit_s=300, env=environ, cwd=REPO)
    assert again.returncode == 0, again.stderr
    assert f"the run is finished at step {STEPS}" in again.stderr
    assert read_metrics(directory) == lines

    inspect = [str(Path(sys.prefix, "bin", "mythos")), "inspect", str(directory), "--rows", "8", "device=cpu"]
    inspected = run(inspect, limit_s=300, env=environ, cwd=REPO)
    assert inspected.returncode == 0, inspected.stderr
    assert {path.stem for path in (directory / "inspect").glob("*.png")} == {"depth", "state", "experts", "cache"}
