"""The results of `make gpu-check`, in docs/gpu.md."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mythos.run.journal import package_versions

REPORT_VARIABLE = "MYTHOS_GPU_REPORT"
HEADING = "## Results"
"""What follows it in docs/gpu.md is replaced."""


class Figure(NamedTuple):
    """A measured number, and what it is held against."""

    check: str
    name: str
    value: float
    criterion: str


def write_report(path: Path, figures: Sequence[Figure], failed: Sequence[str]) -> None:
    """Replace the results in the document by those of this machine's GPU."""
    versions = {"Python": platform.python_version(), "CUDA": torch.version.cuda, **package_versions()}
    properties = torch.cuda.get_device_properties(0)
    described = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB; {described}.",
        "",
        "Failed: " + ", ".join(f"`{name}`" for name in failed) + "." if failed else "All checks that ran have passed.",
        "",
        "| check | figure | measured | criterion |",
        "|---|---|---|---|",
        *(f"| {each.check} | {each.name} | {each.value:.4g} | {each.criterion} |" for each in figures),
    ]
    before, heading, _ = path.read_text(encoding="utf-8").partition(HEADING)
    if not heading:
        raise ValueError(f"{path} has no heading {HEADING!r}")
    path.write_text(before + HEADING + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
