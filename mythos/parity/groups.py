"""Runs that were not planned together, grouped by their configuration, with their seeds told apart.

Two runs are of one group if they differ in nothing but the seed, their directory and options that may change freely
when a run is resumed, such as the micro batch or the number of ranks.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mythos.config.layers import read_saved
from mythos.config.load import flatten, to_dict
from mythos.config.option import change_of
from mythos.config.tree import find
from mythos.errors import UserError
from mythos.files import hash_file
from mythos.parity.measures import Arm
from mythos.parity.results import RunResult, read_run, with_evaluation
from mythos.run.directory import RunDirectory
from mythos.run.find import find_runs

T = TypeVar("T")
NOT_COUNTED = ("seed", "run.directory")
BATCH = ("train.global_batch_sequences", "train.global_batch_tokens")
DATA = ("data.directory", "data.sources")
TOKENIZER = "tokenizer"
"""Beside the options: the hash of the run's tokenizer."""
ROWS = ("data.sequence_length", *DATA, TOKENIZER)
"""What runs must share, beside ``eval.sequences``, for their validation rows to be the same."""
ITEMS = ("documents", "problems_difficulty")
"""What was measured, in an evaluation's arrays."""
OF_LEAVING = ("exit_change", "exit_when_halted")
"""Options of an evaluation by which sequences leave the loop early."""
SEED = r"(^|[-_./ ]+)seed[-_. ]*\d+$"
"""The end of a run's path that tells its seed."""


@dataclass(frozen=True)
class Signature:
    """The same for two evaluations of the same documents or problems in the same way."""

    items: str
    """A hash of the documents or problems."""
    settings: str
    """How they were measured."""
    ordinary: bool
    """With all loop steps, and with BOS before each document."""
    precision: str


@dataclass(frozen=True)
class Found:
    """A run with what tells its group from others, and its evaluations, each as the run with it."""

    run: RunResult
    options: dict[str, Any]
    evaluations: tuple[RunResult, ...]


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, one for each seed."""

    arm: Arm
    runs: tuple[Found, ...]

    @property
    def name(self) -> str:
        """Unique among the groups."""
        return self.arm.name

    @property
    def options(self) -> dict[str, Any]:
        """Of the configuration, by dotted path."""
        return self.runs[0].options


@dataclass(frozen=True)
class Grouped:
    """The groups in the order of their first runs, and what was left out, with the reason."""

    groups: tuple[Group, ...]
    left_out: tuple[str, ...]


def read_groups(places: Sequence[Path]) -> Grouped:
    """Read the runs in these directories, or below them; what is damaged is left out and named.

    Raises:
        UserError: a place has no run, or no run can be compared.
    """
    left_out: list[str] = []
    read = [attempt(partial(_read, path, left_out), left_out) for path in _runs_in(places)]
    found = [each for each in read if each is not None]
    by_key: dict[str, list[Found]] = {}
    for each in found:
        by_key.setdefault(repr(sorted(each.options.items())), []).append(each)
    sets = [_one_for_each_seed(runs, left_out) for runs in by_key.values()]
    if not sets:
        raise UserError("no run can be compared: " + "; ".join(left_out))
    names = _names([[each.run.directory for each in runs] for runs in sets])
    groups = [Group(_arm(name, runs), tuple(runs)) for name, runs in zip(names, sets, strict=True)]
    return Grouped(tuple(groups), tuple(left_out))


def differing_options(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The options in which the groups differ, with the value of each group; None also where it has no such option."""
    paths = sorted({path for group in groups for path in group.options})
    values = {path: [group.options.get(path) for group in groups] for path in paths}
    return {path: each for path, each in values.items() if any(value != each[0] for value in each)}


def differing_rows(runs: Sequence[Found]) -> list[str]:
    """The options because of which the runs were validated on different rows; empty if the rows are the same."""
    first = runs[0]
    differing = [path for path in ROWS if any(each.options.get(path) != first.options.get(path) for each in runs)]
    if not differing and any(each.run.config.eval.sequences != first.run.config.eval.sequences for each in runs):
        return ["eval.sequences"]
    return differing


def _runs_in(places: Sequence[Path]) -> list[Path]:
    below = {place: find_runs(place) for place in places}
    if empty := [str(place) for place, runs in below.items() if not runs]:
        raise UserError(f"{', '.join(empty)}: no run there: give run directories, or directories that contain runs")
    unique = {os.path.realpath(run): run for runs in below.values() for run in runs}
    return list(unique.values())


def attempt(read: Callable[[], T], left_out: list[str]) -> T | None:
    """What was read; None if that failed, with the reason in ``left_out``."""
    try:
        return read()
    except UserError as error:
        left_out.append("; ".join(str(error).splitlines()))
        return None


def _read(directory: Path, left_out: list[str]) -> Found:
    run = read_run(directory)
    if not (run.curve.tokens > 0).any():
        raise UserError(f"{directory}: no validation after its first step yet: compare it when there is one")
    paths = sorted(RunDirectory(directory).evaluations.glob("*.json"))
    evaluations = [attempt(partial(_evaluation, run, path), left_out) for path in paths]
    return Found(run, _options(run), tuple(each for each in evaluations if each is not None))


def _evaluation(run: RunResult, path: Path) -> RunResult:
    """The run with this evaluation. Raises UserError if it has nothing at the depth at which runs are compared."""
    found = with_evaluation(run, path)
    depths = found.evaluation.get("eval", {}).get("depths")
    if None not in (run.depth, depths) and run.depth not in depths:
        measured = ", ".join(map(str, depths))
        raise UserError(f"{path}: not measured at the mean depth {run.depth}, but at {measured}: evaluate there, too")
    return found


def _options(run: RunResult) -> dict[str, Any]:
    directory = RunDirectory(run.directory)
    options = flatten(to_dict(run.config))
    saved = flatten(read_saved(directory.config))
    counted = {path: value for path, value in options.items() if path not in (*NOT_COUNTED, *BATCH) and _counts(path)}
    # The batch is that of the run's file, because ``load_run`` replaces it.
    counted |= {path: saved.get(path) for path in BATCH} | {path: options.get(path) for path in DATA}
    return counted | {TOKENIZER: hash_file(directory.tokenizer) if directory.tokenizer.exists() else None}


def _counts(path: str) -> bool:
    field = find(path)
    return field is None or change_of(field) != "free"


def _one_for_each_seed(runs: Sequence[Found], left_out: list[str]) -> list[Found]:
    """A seed that was trained twice counts once, by the run that is further: a copy is not another sample."""
    chosen: dict[int, Found] = {}
    for each in runs:
        seed = each.run.config.seed
        other = chosen.get(seed)
        if other is None or each.run.step > other.run.step:
            chosen[seed] = each
        if other is not None:
            kept, dropped = chosen[seed], each if chosen[seed] is other else other
            left_out.append(
                f"{dropped.run.directory}: configuration and seed are those of {kept.run.directory}: counted once"
            )
    return list(chosen.values())


def _arm(name: str, runs: Sequence[Found]) -> Arm:
    """With the newest step's evaluation of each run that all of them share."""
    choices = [{signature(each): each for each in sorted(found.evaluations, key=_step)} for found in runs]
    shared = [key for key in choices[0] if all(key in choice for choice in choices)]
    best = max(shared, key=lambda key: preference(key, choices[0][key]), default=None)
    return Arm(name, tuple(found.run if best is None else c[best] for found, c in zip(runs, choices, strict=True)))


def signature(run: RunResult) -> Signature:
    """Of the run's evaluation."""
    digest = hashlib.sha256(repr(run.evaluation.get("data")).encode())
    for name in ITEMS:
        digest.update(run.items.get(name, np.empty(0)).tobytes())
    options = run.evaluation.get("eval", {})
    leaving = [options.get(name) or None for name in OF_LEAVING]
    with_bos = bool(run.evaluation.get("wanted", {}).get("with_bos", True))
    precision = str(run.evaluation.get("precision"))
    settings = repr((leaving, with_bos, precision))
    return Signature(digest.hexdigest(), settings, with_bos and not any(leaving), precision)


def preference(key: Signature, run: RunResult) -> tuple[bool, int, str]:
    """The evaluation with the largest value is compared: an ordinary one, of many documents, in fp32."""
    return key.ordinary, max((len(values) for values in run.items.values()), default=0), key.precision


def _step(run: RunResult) -> int:
    return int(run.evaluation.get("step") or 0)


def _names(sets: Iterable[Sequence[Path]]) -> list[str]:
    """Short, unique names of the groups: what the paths of a group's runs share, below what all of them share."""
    listed = [[os.path.abspath(path) for path in paths] for paths in sets]
    root = os.path.commonpath([os.path.dirname(path) for paths in listed for path in paths])
    names = []
    for paths in listed:
        stems = {re.sub(SEED, "", os.path.relpath(path, root)) for path in paths}
        names.append(os.path.commonpath(stems) or (min(stems) if all(stems) else os.path.basename(root)))
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]
