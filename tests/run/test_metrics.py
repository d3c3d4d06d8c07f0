import errno
import json
import math
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.utils.tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.run.metrics import MetricsWriter, read_metrics
from mythos.run.tensorboard import CurvePosition
from tests.require import missing


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, CurvePosition())
    for step in range(1, 6):
        writer.write(CurvePosition(step), {"train/loss": step / 10})
    writer.close()
    (tmp_path / "metrics.jsonl").open("a", encoding="utf-8").write('{"step": 6, "train/lo')
    writer = MetricsWriter(tmp_path, CurvePosition(3))
    writer.write(CurvePosition(4), {"train/loss": 9.0})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]


def test_losses_are_also_shown_by_tokens_and_by_flops_without_those_after_the_resumed_position(tmp_path: Path) -> None:
    for resumed, losses in ((CurvePosition(), [4.0, 3.0, 2.0]), (CurvePosition(1, 100, 70), [2.5, 1.5])):
        writer = MetricsWriter(tmp_path, resumed)
        for step, loss in enumerate(losses, start=resumed.step + 1):
            writer.write(CurvePosition(step, 100 * step, 70 * step), {"val/loss": loss, "perf/mfu": 0.5})
        writer.close()
        time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
    for directory, unit in (("by_tokens", 100), ("by_gflop", 70)):
        events = EventAccumulator(str(tmp_path / directory))
        events.Reload()
        assert events.Tags()["scalars"] == [f"{directory}/val_loss"]
        points = [(point.step, point.value) for point in events.Scalars(f"{directory}/val_loss")]
        assert points == [(0, 4.0), (unit, 3.0), (2 * unit, 2.5), (3 * unit, 1.5)]


def test_a_resume_after_a_return_from_a_decay_keeps_the_points_of_the_decay(tmp_path: Path) -> None:
    for resumed, positions in (
        (CurvePosition(), [(1, 100), (2, 200), (3, 100), (4, 120)]),
        (CurvePosition(3, 100, 10), [(4, 150), (5, 250)]),
    ):
        writer = MetricsWriter(tmp_path, resumed)
        for step, tokens in positions:
            numbers = {"train/loss": float(step), "train/tokens": float(tokens), "train/flops": tokens * 1e8}
            writer.write(CurvePosition(step, tokens, tokens // 10), numbers)
        writer.close()
        time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
    events = EventAccumulator(str(tmp_path / "by_tokens"))
    events.Reload()
    tokens = {point.step for point in events.Scalars("by_tokens/train_loss")}
    assert tokens >= {100, 200, 150, 250}, "the budget of 200 tokens is not lost"


def test_files_that_cannot_be_made_cost_no_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "no inodes left")

    writer = MetricsWriter(tmp_path, CurvePosition())
    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", refuse)
    monkeypatch.setattr(torch.utils.tensorboard.writer, "FileWriter", refuse)
    writer.write(CurvePosition(1, 1, 1), {"train/loss": 1.0})
    before = len(os.listdir("/proc/self/fd"))
    for step in range(2, 20):
        writer.write(CurvePosition(step, step, step), {"train/loss": 1.0})
    assert len(os.listdir("/proc/self/fd")) == before
    writer.close()
    assert len(read_metrics(tmp_path)) == 19


def test_non_finite_values_are_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, CurvePosition())
    writer.write(CurvePosition(1), {"train/loss": math.nan, "train/gradient_norm": math.inf, "train/tokens": 8.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "train/loss": None,
        "train/gradient_norm": None,
        "train/tokens": 8.0,
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_line_is_never_doubled_by_a_disk_that_was_full_for_a_moment(tmp_path: Path) -> None:
    disk, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        missing("this user may not mount a small disk")
    try:
        writer = MetricsWriter(disk, CurvePosition())
        writer.write(CurvePosition(1), {"train/loss": 1.0})
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 512):
                pass
        step = 1
        while not writer._failing:
            step += 1
            assert step < 1000
            writer.write(CurvePosition(step), {f"train/value_{number}": 1.0 for number in range(40)})
        ballast.unlink()
        writer.write(CurvePosition(step + 1), {"train/loss": 2.0})
        writer.close()
        assert [line["step"] for line in read_metrics(disk)] == list(range(1, step + 2))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
