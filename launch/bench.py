"""`mythos bench`: the speed of this machine, and of training on it."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.table import Column, print_table
from launch.train import run_ranks
from mythos.config.arguments import split_arguments
from mythos.errors import DONE, UserError
from mythos.files import write_atomically

if TYPE_CHECKING:
    import torch

    from mythos.bench.measure import Measurement
    from mythos.config.schema import Config

PEAK_COLUMNS = (Column("what"), Column("type, size"), Column("rate", is_number=True), Column("time", is_number=True))
PART_COLUMNS = (
    Column("part"),
    Column("time", is_number=True),
    Column("share", is_number=True),
    Column("speed", is_number=True),
)
SUMMARY_COLUMNS = (Column(""), Column(""))
NO_MODEL = (
    "model={kind: dense, vocabulary_size: 2, width: 2, layers: 1, feed_forward: {hidden_size: 2}}",
    "model.attention={kind: gqa, heads: 1, kv_heads: 1, head_size: 2}",
    "train.micro_batch_sequences=1",
    "data.sequence_length=2",
)
"""Stands for a configuration where only the machine is measured."""


def run(
    configuration: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE.yaml|key=value]",
            help="model and run to measure, as for `mythos train`; without them only the machine is measured",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar='"key=value ..."', help="also measure with these overrides, in turn: A B A B"),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="measured steps of each round")] = 10,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="steps before them")] = 3,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="rounds of a comparison")] = 2,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures as JSON")] = None,
) -> int:
    """Measure the peaks of this machine, and how fast it trains a model.

    Peaks: matrix products by type and size, copies and, under a launcher, collectives between the ranks. Then training
    steps on random tokens, with the engine of `mythos train`: no data is needed and no run directory is written. The
    time of a step is divided into prelude, loop, coda, head, optimizer, communication and data. docs/bench.md explains
    the figures.

    \b
      mythos bench
      mythos bench MODEL.yaml RUN.yaml train.micro_batch_sequences=4
      mythos bench MODEL.yaml RUN.yaml --compare "loop.recompute=false" --json bench.json
      torchrun --nproc-per-node=8 --no-python mythos bench MODEL.yaml RUN.yaml
    """
    from mythos.config.load import load_without_data

    if compare is not None and not configuration:
        raise UserError("--compare: there is nothing to compare with: give MODEL.yaml RUN.yaml")
    files, overrides = split_arguments(configuration or list(NO_MODEL))
    extra_files, extra = split_arguments(shlex.split(compare or ""))
    if extra_files:
        raise UserError(f"--compare: {extra_files[0]}: not of the form key=value")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--json {output}: there is no directory {output.parent}: create it")
    settings: list[Config] = []

    def configure(world_size: int) -> "Config":
        first = load_without_data(files, overrides, world_size, warmup + steps)
        if configuration:
            settings.append(first)
        if compare is not None:
            settings.append(load_without_data(files, [*overrides, *extra], world_size, warmup + steps))
        return first

    def work(config: "Config", device: "torch.device") -> int:
        from mythos.bench.measure import measure  # imports DeepSpeed, so the device must be set first

        _report(measure(settings, device, warmup, rounds), device, settings, output)
        return DONE

    return run_ranks(configure, work)


def _report(measurement: "Measurement", device: "torch.device", settings: "list[Config]", output: Path | None) -> None:
    """Print the tables and write the JSON, on rank 0."""
    from torch.distributed import get_rank

    from mythos.bench import report

    if get_rank() > 0:
        return
    print_table(PEAK_COLUMNS, report.peak_rows(measurement.peaks))
    for index in range(len(settings)):
        speed = report.joined([speeds[index] for speeds in measurement.rounds])
        if len(settings) > 1:
            print(f"setting {'AB'[index]}")
        print_table(PART_COLUMNS, report.part_rows(speed))
        print_table(SUMMARY_COLUMNS, report.summary_rows(speed))
    if len(settings) > 1:
        print_table(SUMMARY_COLUMNS, report.comparison_rows(measurement))
    if output is not None:
        write_atomically(output, json.dumps(report.to_json(measurement, device, settings), indent=2) + "\n")
