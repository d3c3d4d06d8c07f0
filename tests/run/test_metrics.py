import json
import math
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from mythos.engine.schedule import learning_rate
from mythos.run.health import depth_metrics, expert_metrics, model_metrics
from mythos.run.metrics import MetricsWriter, read_metrics
from mythos.run.throughput import StepClock, peak_memory_gib
from tests.require import lacking
from tests.tiny import tiny_config


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": step / 10})
    writer.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 6, "train/lo')
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"train/loss": 9.0})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]


def test_non_finite_values_are_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"train/loss": math.nan, "train/gradient_norm": math.inf, "train/tokens": 8.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "train/loss": None,
        "train/gradient_norm": None,
        "train/tokens": 8.0,
    }


def test_expert_metrics() -> None:
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 12.0, 4.0]])
    assert expert_metrics(load) == {"moe/load_max_over_mean": 3.0, "moe/experts_unused": 2.0}


def test_depth_and_model_metrics() -> None:
    assert depth_metrics(np.array([1, 3, 8]), 4) == {"depth/mean": 4.0, "depth/with_grad": pytest.approx(8 / 3)}
    parts = [{"loop/state_norm": torch.tensor(2.0)}, {"loop/state_norm": torch.tensor(4.0)}]
    assert model_metrics(parts) == {"loop/state_norm": 3.0}
    assert model_metrics([{}]) == {}


def test_the_clock_splits_waiting_from_working() -> None:
    clock = StepClock()
    with clock.waiting_for_data():
        pass
    assert 0 <= clock.data_wait_seconds <= clock.seconds()
    assert peak_memory_gib(torch.device("cpu")) > 0.05


def test_the_learning_rate_rises_stays_and_falls() -> None:
    def rates(steps: int, **options: object) -> list[float]:
        overrides = {f"optim__{name}": value for name, value in options.items()}
        config = tiny_config("dense", Path("data"), Path("run"), **overrides).optim
        return [learning_rate(config, step, steps) for step in range(steps)]

    linear = rates(10, learning_rate=1.0, warmup_steps=2, cooldown="linear", cooldown_fraction=0.5)
    assert linear == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = rates(
        4, learning_rate=2.0, warmup_steps=0, cooldown="cosine", cooldown_fraction=1.0, final_learning_rate_fraction=0.5
    )
    assert cosine == pytest.approx([1 + 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert rates(3, learning_rate=1.0, warmup_steps=0, cooldown="constant") == [1, 1, 1]
    assert max(rates(5, learning_rate=1.0, warmup_steps=100, cooldown="constant")) == pytest.approx(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_line_is_never_doubled_by_a_disk_that_was_full_for_a_moment(tmp_path: Path) -> None:
    disk, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        lacking("this user may not mount a small disk")
    try:
        writer = MetricsWriter(disk, 0)
        writer.write(1, {"train/loss": 1.0})
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 512):
                pass
        step = 1
        while not writer._failing:
            step += 1
            assert step < 1000
            writer.write(step, {f"train/value_{number}": 1.0 for number in range(40)})
        ballast.unlink()
        writer.write(step + 1, {"train/loss": 2.0})
        writer.close()
        assert [line["step"] for line in read_metrics(disk)] == list(range(1, step + 2))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
