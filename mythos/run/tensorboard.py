"""What TensorBoard shows of a run: curves by step, by tokens and by FLOPs, hparams, a layout of charts, pictures.

    RUN                every metric, by step; with the run's hparams and pictures
    RUN/by_tokens      losses by positions trained on
    RUN/by_gflop       losses by model FLOPs, in units of 10^9
    RUN/evaluations    the results of `mythos eval`
    RUN/inspect        the pictures of `mythos inspect`

These directories are the names of TensorBoard's runs. A file that is still written to has a directory of its own.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.run.directory import RunDirectory

if TYPE_CHECKING:  # the import takes half a second, which only rank 0 has to spend
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

GFLOP = 1e9
LOSSES = {"train/loss": "train_loss", "val/loss": "val_loss"}
"""Also shown by tokens and by FLOPs."""

LAYOUT = {
    "Loss": {
        "training and validation": ["Multiline", ["train/loss$", "val/loss$"]],
        "by tokens": ["Multiline", ["by_tokens/.*"]],
        "by GFLOP": ["Multiline", ["by_gflop/.*"]],
    },
    "Loss by depth": {"validation": ["Multiline", ["val/loss_depth_.*"]]},
    "Loop": {
        "spectral radius": ["Multiline", ["loop/spectral_radius"]],
        "norm of the state": ["Multiline", ["loop/state_norm"]],
        "change in the last loop step": ["Multiline", ["loop/state_change"]],
        "loop steps, all and with gradient": ["Multiline", ["depth/mean", "depth/with_grad"]],
    },
    "Experts": {
        "load, largest over mean": ["Multiline", ["moe/load_max_over_mean"]],
        "unused experts": ["Multiline", ["moe/experts_unused"]],
        "entropy of the router": ["Multiline", ["moe/router_entropy"]],
        "changed choices": ["Multiline", ["moe/choice_changed"]],
    },
    "Speed": {
        "seconds of a step, measured and planned": ["Multiline", ["perf/step_seconds", "plan/step_seconds"]],
        "GiB of a rank, measured and planned": ["Multiline", ["perf/peak_memory_gib", "plan/peak_memory_gib"]],
        "tokens a second": ["Multiline", ["perf/tokens_per_second"]],
        "model FLOPs utilisation": ["Multiline", ["perf/mfu"]],
        "waiting for data": ["Multiline", ["perf/data_wait_seconds"]],
    },
    "Checkpoints": {
        "seconds to save": ["Multiline", ["checkpoint/save_seconds", "checkpoint/stall_seconds"]],
        "gigabytes": ["Multiline", ["checkpoint/gigabytes"]],
        "failures in a row": ["Multiline", ["checkpoint/failures_in_a_row"]],
    },
}
"""Of the tab Custom Scalars: category -> chart -> the metrics in it."""

OUTCOMES = {
    ("", "val/loss"): "validation loss at the trained depth",
    ("evaluations", "eval/rows_bits_per_byte"): "bits per byte",
    ("evaluations", "eval/best_task"): "best task",
    ("", "perf/tokens_per_second"): "tokens a second",
    ("", "perf/mfu"): "MFU",
}
"""Of the tab HParams: (directory in the run, metric) -> column."""


@dataclass(frozen=True)
class CurvePosition:
    """How far curves go: those by step, by tokens and by FLOPs."""

    step: int = -1
    tokens: int = -1
    """Of the present weights: fewer than before after a return from a decay."""
    gflop: int | None = None
    """Likewise; None if an earlier version, which did not count them, began the run."""

    def before(self) -> "CurvePosition":
        """The progress after which all points from this one on are new."""
        return CurvePosition(self.step - 1, self.tokens - 1, None if self.gflop is None else self.gflop - 1)


class TensorBoard:
    """The files that training writes; used by rank 0 alone. Every method raises OSError if the disk is full.

    Args:
        last: later points, from an attempt that was killed, are dropped.
    """

    def __init__(self, directory: Path, last: CurvePosition) -> None:
        with ExitStack() as opened:
            self._by_step = opened.enter_context(_Curves(directory, last.step))
            self._by_tokens = opened.enter_context(_Curves(directory / "by_tokens", last.tokens))
            gflop = -1 if last.gflop is None else last.gflop
            self._by_gflop = opened.enter_context(_Curves(directory / "by_gflop", gflop))
            self._opened = opened.pop_all()

    def write(self, at: CurvePosition, metrics: Mapping[str, float]) -> None:
        """One point in each curve."""
        self._by_step.write(at.step, metrics)
        losses = {shown: metrics[name] for name, shown in LOSSES.items() if name in metrics}
        self._by_tokens.write(at.tokens, {f"by_tokens/{name}": loss for name, loss in losses.items()})
        if at.gflop is not None:
            self._by_gflop.write(at.gflop, {f"by_gflop/{name}": loss for name, loss in losses.items()})

    def write_picture(self, name: str, step: int, pixels: "np.ndarray") -> None:
        """A picture, (height, width, 3) of uint8."""
        self._by_step.writer.add_image(name, pixels, step, dataformats="HWC")

    def write_config(self, config_yaml: str, hparams: Mapping[str, float | str]) -> None:
        """The configuration as text, the hparams with their outcomes, and the layout of charts."""
        from tensorboard.plugins.hparams import summary_v2 as hp
        from torch.utils.tensorboard import summary

        writer = self._by_step.writer
        writer.add_text("config", f"```yaml\n{config_yaml}\n```")
        writer.add_custom_scalars(LAYOUT)
        # A domain tells TensorBoard that a column holds numbers; the first run's columns are those of all.
        everything = hp.RealInterval(0.0, 1e30)
        columns = [hp.HParam(name, None if isinstance(value, str) else everything) for name, value in hparams.items()]
        outcomes = [hp.Metric(tag, group=group, display_name=shown) for (group, tag), shown in OUTCOMES.items()]
        # This form names no group of runs, so that TensorBoard takes each run for itself, under its own name.
        _, values, _ = summary.hparams(dict(hparams), {})
        for each in (hp.hparams_config_pb(columns, outcomes), values):
            writer._get_file_writer().add_summary(each)

    def close(self) -> None:
        """Flush and close all files."""
        self._opened.close()


class _Curves(AbstractContextManager["_Curves"]):
    """A file of points, for which TensorBoard drops the points after ``last`` in the files before it."""

    def __init__(self, directory: Path, last: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The writer opens its file by name at each flush. Through a descriptor the name still means this run's
        # directory after that was moved and another one has taken its place.
        directory.mkdir(exist_ok=True)
        with ExitStack() as opened:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, descriptor)
            self.writer = SummaryWriter(f"/proc/self/fd/{descriptor}", purge_step=last + 1, flush_secs=10)
            opened.callback(self.writer.close)
            self._opened = opened.pop_all()

    def write(self, at: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, at)

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def write_evaluation(directory: Path, step: int, metrics: Mapping[str, float]) -> None:
    """One point in each curve of a run's evaluations, in a file of its own. Raises OSError.

    TensorBoard reads the files of a directory one after the other, so only files that are complete may share one.
    """
    with _complete_file(RunDirectory(directory).evaluations) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def write_inspection(directory: Path, step: int, pictures: Mapping[str, "np.ndarray"]) -> None:
    """Pictures, (height, width, 3) of uint8, in a file of their own. Raises OSError."""
    with _complete_file(RunDirectory(directory).inspections) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")


def _complete_file(directory: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))
