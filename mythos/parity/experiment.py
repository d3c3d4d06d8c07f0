"""An experiment: arms that are trained with several seeds, and a hypothesis with its criterion, in one YAML file.

    name: proxy
    question: Does a small looped model match a standard transformer of 1.7 times its parameters?
    hypothesis: what is expected, written before any run
    criterion:
      metric: bits_per_byte
      looped: looped
      small: small
      large: large
      margin: 0.25
    seeds: [1, 2, 3]
    directory: runs/parity/proxy                 # its runs are in ARM/seed-N below it
    configuration: [configs/run/demo.yaml, checkpoint.every=88]
    arms:
      looped:
        configuration: [configs/model/proxy-looped.yaml, configs/recipe/mythos.yaml]
      looped-equal-flops:
        configuration: [configs/model/proxy-looped.yaml, configs/recipe/mythos.yaml]
        budget: {flops_of: large}                # or tokens: 720000, or tokens_of: large; share: 0.5 gives half of it
      small:
        configuration: [configs/model/proxy-transformer.yaml, configs/recipe/mythos.yaml]
      large:
        configuration: [configs/model/proxy-transformer.yaml, configs/recipe/mythos.yaml, model.layers=11]
    evaluation:
      depths: [1, 2, 4, 8, 16]

``configuration`` lists files and key=value options, as on the command line of `mythos train`; the experiment's come
first. The **design** is everything but ``directory``, ``processes`` and ``task_data``. Its hash is recorded when runs
are started, so that a later change of hypothesis or criterion shows in the report.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from mythos.config import yaml_file
from mythos.config.arguments import split_arguments
from mythos.config.derive import tokens_per_step
from mythos.config.layers import merge, resolve_references
from mythos.config.load import load_for_most
from mythos.config.option import option, section
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.plan.flops import expected_steps, training_flops
from mythos.readers import read_yaml

REMEDY = "give an experiment, such as configs/parity/smoke.yaml"
PLACES = ("directory", "task_data")
"""Keys in which ``${oc.env:NAME}`` is the value of an environment variable; they do not belong to the design."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=NAME, max_length=100)]


@section
class Budget:
    """How long an arm is trained, if not for the steps of its configuration; one of the first three."""

    tokens: float | None = option("positions, as a number", None, gt=0, le=1e18)
    tokens_of: str | None = option("as many positions as this arm", None)
    flops_of: str | None = option("as many training FLOPs (executed: the drawn depths, truncation) as this arm", None)
    share: float = option("of the positions or FLOPs of the other arm", 1.0, gt=0, le=100)


@section
class Arm:
    """A model with its recipe and budget."""

    configuration: tuple[str, ...] = option("files and key=value options, after the experiment's", min_length=1)
    budget: Budget = option("how long it is trained", default_factory=Budget)


@section
class Criterion:
    """When the looped model is said to match the large standard one, fixed before any run.

    With d = metric(looped) - metric(large) and g = metric(small) - metric(large), and the 95% interval of d - margin g
    (signs turned for metrics of which more is better): **matches** if all of it is below 0, **does not match** if all
    of it is above, else **not decided**.
    """

    metric: str = option("loss, bits_per_byte, or the name of a task with its accuracy")
    looped: str = option("the arm that may match")
    small: str = option("the standard arm of its size")
    large: str = option("the standard arm to be matched")
    margin: float = option("share of the gap between small and large that the looped arm may miss", ge=0, le=1)


@section
class Evaluation:
    """What is measured after each run."""

    depths: tuple[Annotated[int, Field(gt=0, le=10_000)], ...] = option("loop depths of looped arms", ())
    tasks: tuple[str, ...] = option("tasks of `mythos eval --tasks`", ())
    task_data: str | None = option("directory of the data of files of tasks", None)
    sequences: int | None = option("validation rows of each data set; null: all", None, gt=0)
    documents: int | None = option("documents of each data set that are measured alone; null: all", 1000, gt=0)


@section
class Experiment:
    """The content of an experiment's file."""

    name: Name = option("letters, digits, dots and hyphens")
    question: str = option("what is asked")
    hypothesis: str = option("what is expected")
    criterion: Criterion = option("what decides")
    seeds: tuple[Seed, ...] = option("training seeds, the same for every arm", min_length=1)
    directory: str = option("the experiment's own directory")
    configuration: tuple[str, ...] = option("files and key=value options of every arm", ())
    arms: dict[Name, Arm] = option("the arms by name", min_length=1)
    evaluation: Evaluation = option("what is measured", default_factory=Evaluation)
    processes: int = option("processes of each run, without Slurm", 1, gt=0, le=1024)


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    directory: Path
    arguments: tuple[str, ...]
    """Of `mythos train`."""
    config: Config
    processes: int


def load_experiment(path: Path) -> Experiment:
    """Read an experiment. Raises UserError for each mistake in it, on one line."""
    tree = read_yaml(path, yaml_file.parse, TypeAdapter(dict[str, Any]), REMEDY)
    for part in (tree, tree.get("evaluation")):  # references in `configuration` are for `mythos train` to resolve
        if isinstance(part, dict):
            places = {name: part[name] for name in PLACES if name in part}
            resolve_references(places)
            part |= places
    try:
        experiment = _ADAPTER.validate_python(tree, strict=False)  # every scalar in the tree is text
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: {where} = {first['input']!r}: {first['msg'].lower()}: correct the experiment"
        ) from None
    _check(path, experiment)
    return experiment


def planned_runs(experiment: Experiment, sizes: Sequence[int] = ()) -> list[PlannedRun]:
    """Every arm with every seed; all arms of the first seed come first, so that an early report has all arms.

    Args:
        sizes: numbers of processes; each arm has the first for which it is valid. By default the experiment's.

    Raises:
        UserError: an arm's configuration is not valid.
    """
    found = {arm: _load(experiment, arm, sizes or (experiment.processes,)) for arm in experiment.arms}
    configs = {arm: config for arm, (config, _) in found.items()}
    steps = {arm: _steps(experiment, arm, configs) for arm in experiment.arms}
    runs = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            directory = run_directory(experiment, arm, seed)
            own = own_options(steps[arm], seed, directory)
            arguments = (*configuration(experiment, arm), *own)
            config, processes = _load(experiment, arm, (found[arm][1],), own)
            runs.append(PlannedRun(arm, seed, directory, arguments, config, processes))
    return runs


def run_directory(experiment: Experiment, arm: str, seed: int | str) -> Path:
    """Where a run is."""
    return Path(experiment.directory) / arm / f"seed-{seed}"


def own_options(steps: int, seed: int | str, directory: Path) -> list[str]:
    """What the runs of an experiment do not share, as options of `mythos train`."""
    return [f"train.steps={steps}", f"seed={seed}", f"run.directory={directory}"]


def design_hash(experiment: Experiment) -> str:
    """Identifies question, hypothesis, criterion, seeds, evaluation and every arm's configuration."""
    # The options themselves count, not the names of the files that they are in.
    places: Any = {"directory": True, "processes": True, "configuration": True, "arms": {"__all__": {"configuration"}}}
    places["evaluation"] = {"task_data"}
    design = _ADAPTER.dump_python(experiment, exclude=places)
    trees = {arm: merge(*split_arguments(configuration(experiment, arm)), resolve=False) for arm in experiment.arms}
    return hashlib.sha256(json.dumps([design, trees], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _steps(experiment: Experiment, arm: str, configs: Mapping[str, Config]) -> int:
    """Optimizer steps of an arm by its budget, rounded up."""
    budget, config = experiment.arms[arm].budget, configs[arm]
    if budget.tokens is not None:
        return math.ceil(budget.tokens / tokens_per_step(config))
    other = budget.tokens_of or budget.flops_of
    if other is None:
        return config.train.steps
    tokens = budget.share * _steps(experiment, other, configs) * tokens_per_step(configs[other])
    if budget.flops_of is not None:
        tokens *= _flops_per_token(configs[other]) / _flops_per_token(config)
    return math.ceil(tokens / tokens_per_step(config))


def _flops_per_token(config: Config) -> float:
    return training_flops(config.model, config.data.sequence_length, expected_steps(config.loop))


def configuration(experiment: Experiment, arm: str) -> tuple[str, ...]:
    """What all seeds of an arm have in common, but for its steps: files and options of `mythos train`."""
    return (*experiment.configuration, *experiment.arms[arm].configuration)


def _load(experiment: Experiment, arm: str, sizes: Sequence[int], own: Sequence[str] = ()) -> tuple[Config, int]:
    """The configuration and the first of the sizes that it is valid for."""
    files, overrides = split_arguments(configuration(experiment, arm))
    try:
        return load_for_most(files, [f"run.directory={experiment.directory}", *overrides, *own], sizes)
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from error


def _check(path: Path, experiment: Experiment) -> None:
    """Names of arms that are referred to exist, and budgets do not refer to each other in a circle."""
    named = {f"criterion.{field}": getattr(experiment.criterion, field) for field in ("looped", "small", "large")}
    for arm, description in experiment.arms.items():
        budget = description.budget
        if sum(value is not None for value in (budget.tokens, budget.tokens_of, budget.flops_of)) > 1:
            raise UserError(f"{path}: arms.{arm}.budget: give one of tokens, tokens_of and flops_of")
        if budget.share != 1 and not (budget.tokens_of or budget.flops_of):
            raise UserError(
                f"{path}: arms.{arm}.budget.share = {budget.share:g}: has no effect without tokens_of or flops_of: "
                "leave it out"
            )
        named |= {f"arms.{arm}.budget": other for other in (budget.tokens_of, budget.flops_of) if other}
    for place, name in named.items():
        if name not in experiment.arms:
            raise UserError(f"{path}: {place} = {name!r}: no such arm: give one of {', '.join(experiment.arms)}")
        budget = experiment.arms[name].budget
        if place.endswith(".budget") and (budget.tokens_of or budget.flops_of):
            raise UserError(f"{path}: {place} = {name!r}: its budget is that of another arm: name that one")


_ADAPTER = TypeAdapter(Experiment)
