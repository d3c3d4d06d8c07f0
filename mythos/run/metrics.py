"""Metrics in metrics.jsonl and TensorBoard, under the same names, without duplicate steps after a resume."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from mythos.files import open_to_append, opened_atomically
from mythos.readers import Number, read_json_lines
from mythos.run.console import log
from mythos.run.directory import RunDirectory
from mythos.run.tensorboard import GFLOP, CurvePosition, TensorBoard

if TYPE_CHECKING:  # only pictures need it
    import numpy as np


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
        resumed: lines of later steps, from an attempt that was killed, are dropped.
    """

    def __init__(self, directory: Path, resumed: CurvePosition) -> None:
        self._directory = directory
        self._unwritten: list[tuple[int, bytes]] = []
        self._failing = False
        self._open(resumed)

    def _open(self, last: CurvePosition) -> None:
        path = RunDirectory(self._directory).metrics
        last = _truncate(path, last)
        self._file = open_to_append(path)  # a buffer would write later what a failed write left in it
        self._tensorboard: TensorBoard | None = TensorBoard(self._directory, last)

    def rewind(self, last: CurvePosition) -> None:
        """Drop the lines of later steps."""
        self._unwritten = [(number, line) for number, line in self._unwritten if number <= last.step]
        self.close()
        try:
            self._open(last)
        except OSError as error:
            log.error(f"metrics of the steps after {last.step} were not dropped ({error}): training continues")
            self._failing, self._tensorboard = True, None

    def write(self, at: CurvePosition, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl and one point in each curve; the losses also by tokens and FLOPs."""
        step, line = at.step, {"step": at.step} | json_values(metrics)
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
                self._tensorboard = TensorBoard(self._directory, at.before())
            self._tensorboard.write(at, metrics)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error(f"metrics of step {step} not written ({error}): training continues")
            self._failing = True
            if self._tensorboard is not None:
                with suppress(OSError):
                    self._tensorboard.close()
                self._tensorboard = None

    def _write(self, line: bytes) -> None:
        """Write the line completely, or raise OSError."""
        while line:  # a disk that fills up accepts a part, and fails at the next write
            line = line[self._file.write(line) :]

    def write_points(self, at: CurvePosition, values: Mapping[str, float]) -> None:
        """Points that belong to TensorBoard alone."""
        self._show(lambda shown: shown.write(at, values))

    def write_picture(self, name: str, step: int, pixels: "np.ndarray") -> None:
        """A picture in TensorBoard, (height, width, 3) of uint8."""
        self._show(lambda shown: shown.write_picture(name, step, pixels))

    def write_config(self, config_yaml: str, hparams: Mapping[str, float | str]) -> None:
        """The configuration as text, and its hparams for TensorBoard's comparison of runs."""
        self._show(lambda shown: shown.write_config(config_yaml, hparams))

    def _show(self, action: Callable[[TensorBoard], None]) -> None:
        """Do without it while the disk is full: ``write`` has reported that."""
        if self._tensorboard is not None:
            with suppress(OSError):
                action(self._tensorboard)

    def close(self) -> None:
        """Flush and close both."""
        try:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            log.error(f"the last metrics were not written ({error})")


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


def _truncate(path: Path, last: CurvePosition) -> CurvePosition:
    """Drop the lines of later steps; returns how far the curves of the lines that stay go.

    That is further than ``last`` by tokens and FLOPs after a return from a decay, whose points stay.
    """
    if not path.exists():
        return last
    tokens, gflop = last.tokens, last.gflop
    with opened_atomically(path) as file:
        for line in iterate_metrics(path.parent):
            if line["step"] <= last.step:
                file.write(json.dumps(line).encode() + b"\n")
                tokens = max(tokens, int(line.get("train/tokens") or 0))
                if gflop is not None:
                    gflop = max(gflop, int((line.get("train/flops") or 0) / GFLOP))
    return CurvePosition(last.step, tokens, gflop)
