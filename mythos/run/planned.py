"""plan.json: what the plan of a run says, beside its measured step time and memory."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.files import write_atomically
from mythos.readers import read_json
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics

if TYPE_CHECKING:  # it imports numpy, which `mythos status` does not need
    from mythos.plan.plan import Plan

TAIL_BYTES = 1 << 18
"""metrics.jsonl may be long: only its end is read."""
RECENT_STEPS = 20


@dataclass(frozen=True)
class StepFigures:
    """Step time and largest memory of a rank, planned or measured; None for what is not known."""

    step_seconds: float | None = None
    peak_memory_gib: float | None = None


class _Planned(TypedDict):
    """What is read of the file."""

    step_seconds: Annotated[float, Field(gt=0, le=1e9)]
    peak_memory_gib: Annotated[float, Field(ge=0, le=1e9)]


class _File(TypedDict):
    planned: _Planned


_FILE, _CONTENT = TypeAdapter(_File), TypeAdapter(dict[str, Any])
REMEDY = "remove it; the next start writes it"


def write_plan(directory: Path, plan: "Plan") -> None:
    """Write the plan; nothing is measured yet."""
    planned = plan.to_json() | {"peak_memory_gib": process_memory_gib(plan)}
    _write(directory, {"planned": planned, "measured": asdict(StepFigures())})


def write_measured(directory: Path) -> None:
    """Add what metrics.jsonl has measured to the plan, if there is one. Raises UserError if a file is damaged."""
    path = RunDirectory(directory).plan
    if path.exists():
        content = read_json(path, _CONTENT, REMEDY)
        measured = measured_figures(read_metrics(directory, TAIL_BYTES))
        _write(directory, content | {"measured": asdict(measured)})


def _write(directory: Path, content: dict[str, Any]) -> None:
    write_atomically(RunDirectory(directory).plan, json.dumps(content, indent=2) + "\n")


def process_memory_gib(plan: "Plan") -> float:
    """Memory of a rank as ``perf/peak_memory_gib`` measures it: on a CPU with that of Python and the libraries."""
    return plan.memory.peak / 2**30 + (0.0 if plan.cluster.is_gpu else plan.cluster.reserved_gib)


def read_planned(directory: Path) -> StepFigures | None:
    """What was planned; None without a plan. Raises UserError if the file is damaged."""
    path = RunDirectory(directory).plan
    if not path.exists():
        return None
    planned = read_json(path, _FILE, REMEDY)["planned"]
    return StepFigures(planned["step_seconds"], planned["peak_memory_gib"])


def measured_figures(metrics: Sequence[dict[str, Any]]) -> StepFigures:
    """Of the last steps in these lines of metrics.jsonl."""
    steps = [line for line in metrics if line.get("perf/step_seconds")][-RECENT_STEPS:]
    if not steps:
        return StepFigures()
    memory = [line["perf/peak_memory_gib"] for line in steps if line.get("perf/peak_memory_gib") is not None]
    seconds = statistics.median(line["perf/step_seconds"] for line in steps)
    return StepFigures(seconds, max(memory, default=None))
