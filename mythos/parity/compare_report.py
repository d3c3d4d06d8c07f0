"""The report of a comparison of runs: groups, differences, what differs between them and pictures, and its numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos.parity.compare import AXES, NEAR, Difference
from mythos.parity.groups import Group, Grouped, differing_options
from mythos.parity.pictures import draw_pictures
from mythos.parity.tables import (
    PREFERRED,
    arms_text,
    bounds,
    left_out_text,
    measured_metrics,
    pictures_text,
    run_numbers,
    table,
    write_files,
)

NOTES = """Each row is at the largest budget that all runs of both groups have reached; in brackets, how much of their
planned training the group and the reference had behind them there. **A group that is not at its end is at a
disadvantage**: its learning rate had not decayed yet. Intervals are by bootstrap over documents, drawn together for
both groups where they are the same, and over training seeds; where there is one value for each run, over seeds alone.
With one seed there is no claim, and a difference whose interval contains 0 is not distinguished. The intervals are not
corrected for the number of comparisons: of 20 comparisons of equal models, one is expected to be called better or worse
by chance. Training FLOPs are those that were executed, by the drawn depths; device hours are those of the steps, and
can be compared on the same kind of device only."""


def write_comparison(grouped: Grouped, rows: Sequence[Difference], directory: Path) -> Path:
    """Write report.md, its pictures and report.json to a directory; returns the path of report.md.

    Raises:
        UserError: the files cannot be written.
    """
    arms = [group.arm for group in grouped.groups]
    metrics = measured_metrics(arms, "validation_loss")
    pictures = draw_pictures(arms, next(name for name in PREFERRED if name in metrics))
    parts = [
        f"# Comparison of {', '.join(group.name for group in grouped.groups)}",
        *_differences_text(rows),
        *arms_text(arms, metrics, "group"),
        *_state_text(grouped.groups),
        *_options_text(grouped.groups),
        *pictures_text(pictures),
        *left_out_text(grouped.left_out),
    ]
    return write_files(parts, _numbers(grouped, rows), pictures, directory)


def cells(row: Difference) -> list[str]:
    """Of a table of differences: group, equal budget, metric, difference, interval, what it means."""
    shares = " and ".join(f"{share:.0%}" for share in row.shares)
    place = [row.group, f"{row.budget:.3g} {AXES[row.axis]} ({shares})"]
    if row.interval is None:
        return [*place, row.metric, "-", "-", row.judgement]
    metric = f"{row.metric} on {row.measured_on}"
    caution = ", at other parts of their training" if abs(row.shares[0] - row.shares[1]) > NEAR else ""
    return [*place, metric, f"{row.interval.estimate:+.4f}", bounds(row.interval), row.judgement + caution]


def _differences_text(rows: Sequence[Difference]) -> Iterator[str]:
    if not rows:
        yield "There is one group: nothing to compare it with."
        return
    yield f"## Differences from {rows[0].reference}"
    heads = ["group", "at equal", "metric", "difference", "95% interval", ""]
    yield table(heads, "lllrrl", [cells(row) for row in rows])
    yield NOTES


def _state_text(groups: Sequence[Group]) -> Iterator[str]:
    rows = []
    for group in groups:
        for found in group.runs:
            run = found.run
            columns = [group.name, str(run.config.seed), f"{run.step:,}", f"{run.config.train.steps:,}"]
            rows.append([*columns, f"{run.points[-1].step:,}", f"`{run.directory}`"])
    yield table(["group", "seed", "step", "of", "last validation", "run"], "lrrrrl", rows)


def _options_text(groups: Sequence[Group]) -> Iterator[str]:
    differing = differing_options(groups)
    if differing:
        yield "## What differs"
        rows = [[path, *("-" if each is None else str(each) for each in own)] for path, own in differing.items()]
        yield table(["option", *(group.name for group in groups)], "l" * (1 + len(groups)), rows)


def _numbers(grouped: Grouped, rows: Sequence[Difference]) -> dict[str, Any]:
    groups = {
        group.name: {
            "options": group.options,
            "runs": [{"directory": str(run.directory), **run_numbers(run)} for run in group.arm.runs],
        }
        for group in grouped.groups
    }
    return {"differences": [asdict(row) for row in rows], "groups": groups, "left_out": list(grouped.left_out)}
