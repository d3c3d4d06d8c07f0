"""A cluster's figures, from ``configs/cluster/*.yaml`` or from what `mythos bench --json` has measured."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from mythos.config import yaml_file
from mythos.errors import UserError
from mythos.readers import check_value, read_json, read_yaml

DIRECTORY = Path(__file__).parents[2] / "configs" / "cluster"
GIB = 2**30
REMEDY = "give a file like those in configs/cluster"
MEMORY_TRAFFIC_OF_A_COPY = 2
"""A byte that is copied is read and written."""
_figures = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
Rate = Annotated[float, Field(gt=0, le=1e18)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
Size = Annotated[float, Field(ge=0, le=1e9)]


@_figures
class Link:
    """What connects the GPUs: bytes/s of one GPU in one direction, and the share of it that collectives reach."""

    bandwidth: Rate
    share: Share
    latency_s: Seconds
    """Until the next rank has a small message."""

    @property
    def bytes_per_second(self) -> float:
        """What collectives reach."""
        return self.bandwidth * self.share


@_figures
class Cluster:
    """Identical nodes; the processes of a CPU count as GPUs. Rates are those of one GPU."""

    name: str
    devices: list[str]
    """Names that PyTorch gives to such a GPU, or ``cpu``."""
    gpus_per_node: Annotated[int, Field(gt=0, le=10_000)]
    is_gpu: bool
    peak_flops: dict[str, Rate]
    """FLOP/s of matrix products, by type."""
    product_share: Share
    """Of the peak, that the matrix products of a model reach."""
    kernel_start_s: Seconds
    """Until the host has started one kernel, run operation by operation."""
    memory_gib: Size
    reserved_gib: Size
    """Memory that the model cannot use."""
    memory_bandwidth: Rate
    memory_share: Share
    """Of the bandwidth, that elementwise work reaches."""
    host_memory_gib: Size
    """Memory of a node besides that of its GPUs."""
    copy_to_host_bandwidth: Rate
    inside: Link
    """Between the GPUs of a node."""
    between: Link
    """Between nodes."""
    storage_bandwidth: Rate
    """Of the file system, for all nodes together."""
    dollars_per_gpu_hour: Size
    gpu_hours_between_failures: Rate
    """GPU hours of a job between two failures, on average."""
    restart_s: Seconds
    """From a failure to the next step."""

    def peak(self, precision: str) -> float:
        """FLOP/s of one GPU in the training type. Raises UserError."""
        if precision not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise UserError(f"precision = {precision!r}: {self.name} has no peak for it: give peak_flops, or {known}")
        return self.peak_flops[precision]

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that the model can use."""
        return (self.memory_gib - self.reserved_gib) * GIB


class _Matmul(TypedDict):
    """Over all ranks together."""

    dtype: str
    flops_per_second: Rate


class _Copy(TypedDict):
    """Over all ranks together."""

    kind: str
    bytes_per_second: Rate


class _Collective(TypedDict):
    """Bus bytes are those that a rank sends."""

    kind: str
    bytes: int
    seconds: Rate
    bus_bytes_per_second: Rate


class _Peaks(TypedDict):
    """What `mythos bench` measures of a machine."""

    matmul: list[_Matmul]
    copies: list[_Copy]
    collectives: list[_Collective]


class _Bench(TypedDict):
    """What is read of a file of `mythos bench --json`."""

    device: str
    ranks: Annotated[int, Field(gt=0)]
    peaks: _Peaks


_CLUSTER, _BENCH = TypeAdapter(Cluster), TypeAdapter(_Bench)
_TREE = TypeAdapter(dict[str, Any])


def load_cluster(name: str, options: Sequence[str] = ()) -> Cluster:
    """A cluster by its name or file.

    Args:
        name: of a file in configs/cluster without its ending; or a YAML file; or what `mythos bench --json` wrote.
        options: ``cluster.NAME=VALUE`` that replace figures of the file.

    Raises:
        UserError: there is no such file, or it is not one of a cluster.
    """
    path = Path(name) if "/" in name or name.endswith((".yaml", ".json")) else DIRECTORY / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in DIRECTORY.glob("*.yaml")))
        raise UserError(f"--cluster {name}: there is no such file ({path}): give a YAML file, or one of {known}")
    tree = _measured(path) if path.suffix == ".json" else read_yaml(path, yaml_file.parse, _TREE, REMEDY)
    for text in options:
        _replace(tree, text)
    return check_value(path, tree, _CLUSTER, REMEDY)


def cluster_of_device(device: str, memory_bytes: float, per_node: int) -> Cluster | None:
    """The cluster whose GPUs have this name, with the memory and the number on a node that were found; None if unknown.

    Args:
        device: as PyTorch names it, or ``cpu``.
        memory_bytes: of one GPU, or of one process on a CPU.
    """
    for path in sorted(DIRECTORY.glob("*.yaml")):
        cluster = load_cluster(path.stem)
        if device in cluster.devices:
            return replace(cluster, memory_gib=memory_bytes / GIB, gpus_per_node=per_node)  # type: ignore[type-var]
    return None


def _replace(tree: dict[str, Any], text: str) -> None:
    path, _, value = text.removeprefix("cluster.").partition("=")
    *sections, name = path.split(".")
    for part in sections:
        tree = tree.get(part, {})
    if name not in tree:
        raise UserError(f"{text}: a cluster has no such figure: give one that its file in configs/cluster has")
    tree[name] = yaml_file.parse(value)


def _measured(path: Path) -> dict[str, Any]:
    """The figures of a node that was measured; what is not measured is that of configs/cluster/cpu.yaml."""
    found = read_json(path, _BENCH, "write it with `mythos bench --json FILE`")
    peaks, ranks = found["peaks"], found["ranks"]
    tree = read_yaml(DIRECTORY / "cpu.yaml", yaml_file.parse, _TREE, REMEDY)
    flops: dict[str, float] = {}
    for rate in peaks["matmul"]:
        flops[rate["dtype"]] = max(flops.get(rate["dtype"], 0.0), rate["flops_per_second"] / ranks)
    copy = next(rate["bytes_per_second"] for rate in peaks["copies"] if rate["kind"] == "on the device")
    tree |= {"name": f"{ranks} x {found['device']}, measured", "gpus_per_node": ranks, "peak_flops": flops}
    tree |= {"memory_bandwidth": MEMORY_TRAFFIC_OF_A_COPY * copy / ranks}
    if collectives := peaks["collectives"]:
        largest = max(rate["bytes"] for rate in collectives)
        rates = [rate["bus_bytes_per_second"] for rate in collectives if rate["bytes"] == largest]
        latency = min(rate["seconds"] for rate in collectives) / max(1.0, math.log2(ranks))
        tree["inside"] = {"bandwidth": sum(rates) / len(rates), "share": 1.0, "latency_s": latency}
    return tree
