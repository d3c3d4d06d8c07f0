"""Checks before the first step: all ranks run the same code and configuration, and each has its device, data and disk.

Every finding names the rank and its host, and all ranks raise the same error.
"""

import functools
import hashlib
import json
import platform
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mythos
from mythos.config.consent import differences
from mythos.config.derive import global_batch_sequences, text_ids
from mythos.config.load import flatten, to_dict
from mythos.config.schema import Config, Run
from mythos.data.open import RunData, open_data
from mythos.errors import UserError
from mythos.plan.memory import checkpoint_bytes
from mythos.ranks import group
from mythos.ranks.group import agree
from mythos.run.console import log
from mythos.run.directory import RunDirectory
from mythos.run.journal import package_versions

CHECKPOINTS_THAT_MUST_FIT = 2
GIB = 2**30


@dataclass(frozen=True)
class RankReport:
    """What the ranks compare: where each one runs, on which device, with which versions and options."""

    rank: int
    host: str
    device: str
    gpu: str | None
    """The GPU's unique identifier; None on a CPU."""
    versions: Mapping[str, str | None]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"rank {self.rank} on {self.host}: {self.device}, {versions}"

    @property
    def place(self) -> str:
        """Rank and host, for findings."""
        return f"rank {self.rank} on {self.host}"


def check_ranks(config: Config, device: torch.device) -> None:
    """Compare the ranks before their first collective.

    Raises:
        UserError: the ranks differ in code, versions or configuration, or two of them use the same GPU.
    """
    size = config.parallel.expert_parallel_size

    def compare(texts: list[str]) -> str:
        reports = [RankReport(**json.loads(text)) for text in texts]
        if size is not None and (warning := expert_groups_across_hosts(size, [report.host for report in reports])):
            log.warning(warning)
        return "\n".join(f"  {finding}" for finding in (*differing(reports), *shared_gpus(reports)))

    if findings := group.ask_rank_0(json.dumps(asdict(own_report(config, device))), compare):
        raise UserError(f"the ranks do not match:\n{findings}", agreed=True)


def gather_reports(config: Config, device: torch.device) -> list[RankReport]:
    """The reports of all ranks on rank 0, and only its own on other ranks. Collective."""
    own = own_report(config, device)
    reports: list[Any] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, reports)
    return reports or [own]


def check_run_directory(config: Config) -> None:
    """Check that every rank can write to the run directory, and that the next checkpoints fit on the disk. Collective.

    Rank 0 has created the directory.

    Raises:
        UserError: a rank cannot write there, or the disk is too full.
    """
    agree(lambda: _check_writable(config.run))
    agree(lambda: _check_space(config) if dist.get_rank() == 0 else None)


def open_data_everywhere(config: Config) -> RunData:
    """Call ``open_data`` on every rank and check that all ranks opened the same data. Collective.

    Raises:
        UserError: as ``open_data``; or two nodes have different data at the same path.
    """
    batch = global_batch_sequences(config)
    data = agree(lambda: open_data(config.data, text_ids(config.model), config.seed, batch))
    identities: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(identities, (socket.gethostname(), data.identity))
    first_host, first = identities[0]
    for rank, (host, identity) in enumerate(identities):
        for name, (here, there) in differences(first, identity).items():
            raise UserError(
                f"data: {name} is {here!r} for rank 0 on {first_host}, {there!r} for rank {rank} on {host}: "
                "copy the same data set to every node",
                agreed=True,
            )
    return data


def own_report(config: Config, device: torch.device) -> RankReport:
    """The report of this rank."""
    name, gpu = "cpu", None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{device} {properties.name} {properties.total_memory / GIB:.0f} GiB"
        gpu = str(getattr(properties, "uuid", None) or device)
    options = flatten(to_dict(config))
    return RankReport(group.own_rank(), socket.gethostname(), name, gpu, versions(), options)


def versions() -> dict[str, str | None]:
    """The version of everything that must be the same on all ranks for the run to be correct."""
    found = {"python": platform.python_version(), "code": code_version(), **package_versions()}
    del found["mythos"]  # the code's own digest says more
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def code_version() -> str:
    """A digest of this package's source files, which identifies the installed code without git."""
    root = Path(mythos.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differing(reports: Sequence[RankReport]) -> list[str]:
    """One line for each rank and each version or option in which it differs from the majority."""
    findings = []
    for kind, tables in (("", [r.versions for r in reports]), ("option ", [r.options for r in reports])):
        for name in sorted({name for table in tables for name in table}):
            values = [repr(table.get(name)) for table in tables]
            usual = Counter(values).most_common(1)[0][0]  # of equally common values, that of the first rank
            findings += [
                f"{report.place}: {kind}{name} {value}, elsewhere {usual}: "
                + ("give every rank the same configuration" if kind else "run the same environment on every node")
                for report, value in zip(reports, values, strict=True)
                if value != usual
            ]
    return findings


def shared_gpus(reports: Sequence[RankReport]) -> list[str]:
    """One line for each rank whose GPU a lower rank uses already."""
    first: dict[tuple[str, str], int] = {}
    findings = []
    for report in reports:
        if report.gpu is not None:
            other = first.setdefault((report.host, report.gpu), report.rank)
            if other != report.rank:
                findings.append(
                    f"{report.place}: has the same GPU as rank {other} ({report.device}): start one process per GPU"
                )
    return findings


def expert_groups_across_hosts(size: int, hosts: Sequence[str]) -> str | None:
    """A warning if the ``size`` consecutive ranks that share a set of experts are not all on one host."""
    for first in range(0, len(hosts), size):
        group_hosts = dict.fromkeys(hosts[first : first + size])
        if len(group_hosts) > 1:
            return (
                f"parallel.expert_parallel_size = {size}: ranks {first} to {first + size - 1} share a set of experts "
                f"across {len(group_hosts)} nodes ({', '.join(group_hosts)}): every loop step waits for the network; "
                "choose a size that divides the number of processes of a node, or null"
            )
    return None


def _check_writable(run: Run) -> None:
    directory = RunDirectory(Path(run.directory))
    try:
        for needed in (directory.logs, directory.checkpoints):
            with tempfile.TemporaryFile(dir=needed) as file:
                file.write(b"x")
                file.flush()
    except OSError as error:
        raise UserError(
            f"run.directory = {run.directory!r}: cannot be written: {error.strerror}: choose a directory that every "
            "node can read and write"
        ) from error


def _check_space(config: Config) -> None:
    needed = checkpoint_bytes(config) * CHECKPOINTS_THAT_MUST_FIT
    place = RunDirectory(Path(config.run.directory)).checkpoints  # may be a link to another disk
    free = shutil.disk_usage(place).free
    if free < needed:
        disk = f" on the disk of {place.resolve()}" if place.is_symlink() else ""
        raise UserError(
            f"run.directory = {config.run.directory!r}: {free / GIB:.3g} GiB free{disk}, the next "
            f"{CHECKPOINTS_THAT_MUST_FIT} checkpoints need about {needed / GIB:.3g} GiB: free space, or choose another "
            "directory"
        )
