"""Metrics in metrics.jsonl and TensorBoard, under the same names, without duplicate steps after a resume."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from mythos.files import open_to_append, opened_atomically
from mythos.readers import Number, read_json_lines
from mythos.run.console import log
from mythos.run.directory import RunDirectory

if TYPE_CHECKING:  # the import takes half a second, which only rank 0 has to spend
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter


def _check_step(line: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(line.get("step"), int):
        raise ValueError("has no step")
    return line


_LINE: TypeAdapter[Any] = TypeAdapter(Annotated[dict[str, Number | None], AfterValidator(_check_step)])


class MetricsWriter:
    """Writes scalars of a step to both places; used by rank 0 alone.

    A full or missing disk does not end the training: the error is logged once, and lines that could not be written to
    metrics.jsonl are written when there is space again. TensorBoard's curves then have a gap.

    Args:
        directory: the run directory.
        resumed_step: lines of later steps, from an attempt that was killed, are dropped; -1: all lines.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        self._directory = directory
        self._unwritten: list[tuple[int, bytes]] = []
        self._failing = False
        self._open(resumed_step)

    def _open(self, last_step: int) -> None:
        path = RunDirectory(self._directory).metrics
        _truncate(path, last_step)
        self._file = open_to_append(path)  # a buffer would write later what a failed write left in it
        self._tensorboard: SummaryWriter | None = self._open_tensorboard(last_step)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after this one."""
        self._unwritten = [(number, line) for number, line in self._unwritten if number <= step]
        self.close()
        try:
            self._open(step)
        except OSError as error:
            log.error(f"metrics of the steps after {step} were not dropped ({error}): training continues")
            self._failing, self._tensorboard = True, None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl and one point in each curve."""
        line = {"step": step} | json_values(metrics)
        self._unwritten.append((step, json.dumps(line).encode() + b"\n"))
        try:
            if self._failing:  # the directory may be a new one, and its last line may be incomplete
                self._file.close()
                self._file = open_to_append(RunDirectory(self._directory).metrics)
                self._write(b"\n")
            while self._unwritten:
                self._write(self._unwritten[0][1])
                del self._unwritten[0]
            if self._tensorboard is None:
                self._tensorboard = self._open_tensorboard(step - 1)
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error(f"metrics of step {step} not written ({error}): training continues")
            self._failing, self._tensorboard = True, None

    def _write(self, line: bytes) -> None:
        """Write the line completely, or raise OSError."""
        while line:  # a disk that fills up accepts a part, and fails at the next write
            line = line[self._file.write(line) :]

    def _open_tensorboard(self, last_step: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        # The writer opens its file by name at each flush. Through a descriptor the name still means this run's
        # directory after that was moved and another one has taken its place.
        directory = RunDirectory(self._directory).tensorboard
        directory.mkdir(exist_ok=True)
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        return SummaryWriter(f"/proc/self/fd/{self._descriptor}", purge_step=last_step + 1, flush_secs=10)

    def write_config(self, config_yaml: str, options: Mapping[str, Any]) -> None:
        """The configuration as text, and as hparams for TensorBoard's comparison of runs."""
        if self._tensorboard is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()
        }
        self._tensorboard.add_text("config", f"```yaml\n{config_yaml}\n```")
        for summary in hparams(values, {"train/loss": 0.0}):
            self._tensorboard._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Flush and close both."""
        try:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
                os.close(self._descriptor)
        except OSError as error:
            log.error(f"the last metrics were not written ({error})")


def write_points(directory: Path, step: int, metrics: Mapping[str, float]) -> None:
    """One point in each TensorBoard curve, in a file of its own. Raises OSError.

    TensorBoard reads the files of a directory one after the other, so only files that are complete may share one.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def write_pictures(directory: Path, step: int, pictures: Mapping[str, "np.ndarray"]) -> None:
    """Pictures, (height, width, 3) of uint8, in TensorBoard, in a file of its own. Raises OSError."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")


def json_values(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics with null for a non-finite value, which JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(directory: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, or those in its last bytes. Lines that cannot be read are left out.

    Raises:
        UserError: the file cannot be read.
    """
    return list(iterate_metrics(directory, last_bytes))


def iterate_metrics(directory: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Like ``read_metrics``, one line at a time: the file may be long."""
    return read_json_lines(RunDirectory(directory).metrics, _LINE, last_bytes)


def _truncate(path: Path, last_step: int) -> None:
    if path.exists():
        with opened_atomically(path) as file:
            for line in iterate_metrics(path.parent):
                if line["step"] <= last_step:
                    file.write(json.dumps(line).encode() + b"\n")
