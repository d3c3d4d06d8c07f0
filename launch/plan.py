"""`mythos plan`: memory, speed and cost of a run before it is started."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.arguments import Configuration
from launch.table import Column, print_table
from mythos.config.arguments import split_arguments
from mythos.errors import DONE, UserError

if TYPE_CHECKING:
    from mythos.plan.cluster import Cluster
    from mythos.plan.plan import Plan

NAME, VALUE = Column(""), Column("", is_number=False)
SHOWN_IF_THEY_FIT = {"dollars": 1, "recompute": 2, "accumulation": 3, "MFU": 4, "nodes": 5}
"""The columns of layouts that a narrow terminal leaves out."""


def run(
    configuration: Configuration,
    cluster: Annotated[
        str,
        typer.Option(metavar="NAME", help="file in configs/cluster, a YAML file, or a JSON file of `mythos bench`"),
    ] = "h100",
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="number of nodes")] = 1,
    search: Annotated[bool, typer.Option("--search", help="rank the layouts that fit, on up to --nodes nodes")] = False,
    by: Annotated[Literal["time", "cost"], typer.Option(help="what --search ranks by")] = "time",
    top: Annotated[int, typer.Option(metavar="N", min=1, help="rows that --search prints")] = 10,
    compare: Annotated[
        bool, typer.Option("--compare", help="the first two files are models, which are compared side by side")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the plan as JSON")] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="draw step time and price by number of GPUs and EP size"),
    ] = None,
) -> int:
    """Plan a run: does it fit, how long does it take, what does it cost.

    Needs no GPU and no torch. Figures of the cluster are replaced by cluster.NAME=VALUE.

    \b
      mythos plan MODEL.yaml RUN.yaml --cluster h100 --nodes 2
      mythos plan MODEL.yaml RUN.yaml --nodes 4 --search --by cost
      mythos plan --compare MODEL_A.yaml MODEL_B.yaml
      mythos plan MODEL.yaml RUN.yaml --cluster b200 cluster.dollars_per_gpu_hour=6 train.micro_batch_sequences=4
    """
    from mythos.plan.cluster import load_cluster

    files, overrides = split_arguments([part for part in configuration if not _is_of_cluster(part)])
    machines = load_cluster(cluster, [part for part in configuration if _is_of_cluster(part)])
    for path in filter(None, (output, picture)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no directory {path.parent}: create it")
    if compare:
        return _compare(files, overrides, machines, nodes, output)
    if search:
        return _search(files, overrides, machines, nodes, by, top, output)
    plan = _plan(files, overrides, machines, nodes)
    _print(plan)
    if output is not None:
        _write(output, plan.to_json())
    if picture is not None:
        _plot(plan, picture)
    return DONE


def _is_of_cluster(part: str) -> bool:
    return part.startswith("cluster.") and "=" in part


def _plan(files: list[str], overrides: list[str], machines: "Cluster", nodes: int) -> "Plan":
    from mythos.config.load import load
    from mythos.plan.plan import make_plan

    ranks = nodes * machines.gpus_per_node
    return make_plan(load(files, overrides, ranks), ranks, machines)


def _print(plan: "Plan") -> None:
    from mythos.plan import report

    layout, config = plan.layout, plan.config
    title = (
        f"{layout.ranks} GPUs ({layout.nodes} x {plan.cluster.name}), ZeRO {config.parallel.zero_stage}, "
        f"expert-parallel size {layout.expert_parallel_size}, {plan.precision}"
    )
    print(title)
    columns = [Column("collective"), Column("kind"), Column("ranks"), Column("a step", is_number=True)]
    columns += [Column("bytes a GPU", is_number=True), Column("time", is_number=True), Column("")]
    tables = (
        ("model", (Column("model"), Column("", is_number=True)), report.model_rows(plan)),
        ("memory", (Column("memory of a GPU"), Column("", is_number=True)), report.memory_rows(plan)),
        ("communication", tuple(columns), report.communication_rows(plan)),
        ("time", (Column("time"), Column("", is_number=True), Column("")), report.time_rows(plan)),
        ("cost", (Column("cost"), Column("", is_number=True)), report.cost_rows(plan)),
    )
    for name, heads, rows in tables:
        if rows:
            print(f"\n{name}")
            print_table(heads, rows)


def _search(
    files: list[str],
    overrides: list[str],
    machines: "Cluster",
    nodes: int,
    by: Literal["time", "cost"],
    top: int,
    output: Path | None,
) -> int:
    from mythos.config.load import load
    from mythos.plan import report
    from mythos.plan.search import node_counts, search

    config = load(files, [*overrides, "train.micro_batch_sequences=1"], 1)
    found = search(config, machines, node_counts(nodes), by)
    plans = found.fitting[:top]
    if not plans:
        least = found.least_memory
        needs = "no layout divides the batch" if least is None else f"the least is {report.binary(least.memory.peak)}"
        raise UserError(
            f"no layout fits {nodes} nodes of {machines.name} ({report.binary(machines.usable_bytes)} a GPU; {needs}): "
            "take more nodes, or a batch that the number of GPUs divides"
        )
    *numbers, last = report.LAYOUT_HEADERS
    print_table(
        [*(Column(name, is_number=True, if_it_fits=SHOWN_IF_THEY_FIT.get(name)) for name in numbers), Column(last)],
        [report.layout_cells(plan) for plan in plans],
    )
    if output is not None:
        _write(output, [plan.to_json() for plan in found.fitting])
    return DONE


def _compare(files: list[str], overrides: list[str], machines: "Cluster", nodes: int, output: Path | None) -> int:
    from mythos.plan import report
    from mythos.plan.cluster import DIRECTORY

    if len(files) < 2:
        raise UserError("--compare: give two models: mythos plan --compare MODEL_A.yaml MODEL_B.yaml [RUN.yaml]")
    first, second, *rest = files
    rest = rest or [str(DIRECTORY.parent / "run" / "pretrain.yaml")]
    plans = {Path(model).stem: _plan([model, *rest], overrides, machines, nodes) for model in (first, second)}
    if len(plans) < 2:
        raise UserError(f"--compare: both models are {first}: give two different ones")
    print_table([Column(""), *(Column(name, is_number=True) for name in plans)], report.comparison_rows(plans))
    if output is not None:
        _write(output, {name: plan.to_json() for name, plan in plans.items()})
    return DONE


def _plot(plan: "Plan", picture: Path) -> None:
    from mythos.plan.plot import plot
    from mythos.plan.search import by_expert_parallel_size, by_nodes

    plot(by_nodes(plan), by_expert_parallel_size(plan), picture)


def _write(path: Path, value: object) -> None:
    from mythos.files import write_atomically

    write_atomically(path, json.dumps(value, indent=2) + "\n")
