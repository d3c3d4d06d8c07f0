"""metrics.jsonl and TensorBoard, under the same names, without doubled steps after a resume."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mythos.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars of a step to both places; used by rank 0 alone.

    Args:
        directory: the run directory.
        resumed_step: what was written for later steps (by a life that was killed) is dropped; -1: everything.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        path = directory / METRICS_FILE
        _truncate(path, resumed_step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl (a non-finite value as null, which JSON can hold) and one point in each curve."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_config(self, config_yaml: str, options: Mapping[str, Any]) -> None:
        """The configuration as text, and as hparams for TensorBoard's comparison of runs."""
        self._tensorboard.add_text("config", f"```yaml\n{config_yaml}\n```")
        values = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()
        }
        for summary in hparams(values, {"train/loss": 0.0}):
            self._tensorboard._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl that can be read; one that was cut by a kill is left out."""
    path = directory / METRICS_FILE
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _truncate(path: Path, last_step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
