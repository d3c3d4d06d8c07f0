"""What is measured of a checkpoint beside its validation losses; the work of rank 0, which asks all ranks for scores.

Text is measured in two ways (docs/metrics.md): ``rows``, packed as in training, where BOS is predicted as well; and
``documents``, each alone (``mythos.eval.documents``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mythos.data.open import RunData, read_tokenizer
from mythos.data.stream import Source
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.eval import tasks
from mythos.eval.answers import read_problems
from mythos.eval.batches import validation_rows
from mythos.eval.documents import bytes_in_rows, read_documents
from mythos.eval.requests import Prompt, Request, Scorer, Writer
from mythos.files import hash_file
from mythos.run.console import log

Metrics = dict[str, float]
Items = dict[str, np.ndarray]
"""Of each document or synthetic problem, by name: what it is, and what was measured of it at each depth."""


@dataclass(frozen=True)
class Question:
    """For all ranks: requests to score or a prompt to continue, at a number of loop steps (None for a dense model)."""

    asked: Sequence[Request] | Prompt
    steps: int | None


Ask = Callable[[Question], Any]


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the validation losses.

    ``documents`` of each source are measured, None for all, 0 for none; ``with_bos``: see ``mythos.eval.documents``.
    ``tasks`` are files of ``mythos.eval.tasks``, whose data is in ``task_data``, and names or files of
    lm-evaluation-harness; of each task, ``limit`` items are measured, None for all.
    """

    documents: int | None = 1000
    with_bos: bool = True
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None


def text_metrics(
    ask: Ask,
    data: RunData,
    losses: Mapping[str, float],
    depths: Sequence[int | None],
    sequences: int | None,
    wanted: Wanted,
) -> tuple[Metrics, Items]:
    """Loss, perplexity and bits per byte at each depth, of rows and of documents, and the values of each document.

    Without a tokenizer that can be read only those that need none are measured.

    Args:
        losses: those of ``validate``.
        sequences: the rows that they were measured on, of each source.

    Raises:
        UserError: the data cannot be read.
    """
    try:
        tokenizer = read_tokenizer(data.tokenizer)
        bos = tokenizer.token_to_id(data.bos)
    except UserError as error:
        log.warning(f"no bits per byte, and no losses of documents: {error}")
        tokenizer = bos = None
    rows = [_of_rows(source, len(data.validation), losses, depths, sequences, tokenizer) for source in data.validation]
    found = _named("rows_", data.validation, depths, rows)
    items: Items = {}
    if data.validation[0].dataset.manifest.answers is not None:
        of_sources = []
        for source in data.validation:
            problems = read_problems(source.dataset)
            solved = {steps: problems.solved(_scorer(ask, steps)) for steps in depths}
            of_sources.append([problems.accuracies(solved[steps]) for steps in depths])
            one = {f"problems_solved{suffix(at)}": each for at, each in solved.items()}
            items |= _of_source(source, data, problems.items() | one)
        found |= _named("", data.validation, depths, of_sources)
    elif tokenizer is not None and wanted.documents != 0:
        of_sources = []
        for source in data.validation:
            text = read_documents(source.dataset, tokenizer, bos, wanted.documents, wanted.with_bos)
            nats = {steps: text.nats(_scorer(ask, steps)) for steps in depths}
            of_sources.append([text.metrics(nats[steps]) for steps in depths])
            one = {f"documents_nats{suffix(at)}": each for at, each in nats.items()}
            items |= _of_source(source, data, text.items() | one)
        found |= _named("documents_", data.validation, depths, of_sources)
    return found, items


def task_metrics(
    ask: Ask, data: RunData, longest: int, depths: Sequence[int | None], wanted: Wanted
) -> tuple[Metrics, dict[str, Any]]:
    """One metric of each task at each depth, and everything that is known of it.

    Raises:
        UserError: a task or its data cannot be read.
    """
    tokenizer = read_tokenizer(data.tokenizer)
    tokenizer.encode_special_tokens = True  # BOS inside a text is text
    metrics: Metrics = {}
    details: dict[str, Any] = {}
    lists, others = _sorted(wanted.tasks)
    for each in lists.values():
        found = _of_list(ask, each, tokenizer, tokenizer.token_to_id(data.bos), longest, depths, wanted)
        for name, results in found.items():
            metrics |= {f"eval/{name}{suffix(steps)}": each.accuracy for steps, each in results.items()}
            details |= {f"{name}{suffix(steps)}": asdict(each) for steps, each in results.items()}
        for steps in depths:
            centred = [results[steps].centred for results in found.values()]
            metrics[f"eval/{each['name']}{suffix(steps)}"] = math.fsum(centred) / len(centred)
    for steps in depths if others else ():
        model = _harness().MythosLM(_scorer(ask, steps), _writer(ask, steps), tokenizer, data.bos, longest)
        for name, values in _harness().run_tasks(model, others, wanted.limit).items():
            metrics |= {f"eval/{name}{suffix(steps)}": value for value in list(values.values())[:1]}
            details[f"{name}{suffix(steps)}"] = values
    return metrics, details


def hash_tasks(wanted: Wanted) -> dict[str, str]:
    """The hash of each file that the tasks are read from; those of lm-evaluation-harness have no files of data here.

    Raises:
        UserError: a file cannot be read, or there is no such task.
    """
    lists, others = _sorted(wanted.tasks)
    paths = [Path(name) for name in wanted.tasks if name.endswith(".yaml")]
    paths += [Path(wanted.task_data or "") / task["file"] for each in lists.values() for task in each["tasks"]]
    if others:
        _harness().check_names(others)
    found = {}
    for path in paths:
        with os_errors_as_user_errors(path, "name the directory of the tasks' data with --task-data"):
            found[str(path)] = hash_file(path)
    return found


def _sorted(names: Sequence[str]) -> tuple[dict[str, tasks.TaskList], list[str]]:
    """The lists of tasks by file, and the tasks of lm-evaluation-harness."""
    lists = {name: tasks.read_tasks(Path(name)) for name in names if tasks.is_list(Path(name))}
    return lists, [name for name in names if name not in lists]


def _of_list(
    ask: Ask,
    each: tasks.TaskList,
    tokenizer: Tokenizer,
    bos: int,
    longest: int,
    depths: Sequence[int | None],
    wanted: Wanted,
) -> dict[str, dict[int | None, tasks.Accuracy]]:
    """The accuracy of each task at each depth."""
    found: dict[str, dict[int | None, tasks.Accuracy]] = {}
    for task in each["tasks"]:
        items = tasks.read_items(Path(wanted.task_data or "") / task["file"], task["kind"], wanted.limit)
        found[task["name"]] = {
            steps: tasks.accuracy(task, items, tokenizer, bos, longest, _scorer(ask, steps)) for steps in depths
        }
        log.info(
            f"{task['name']}: accuracy " + ", ".join(f"{one.accuracy:.4f}" for one in found[task["name"]].values())
        )
    return found


def _harness() -> Any:
    try:
        from mythos.eval import harness
    except ImportError as error:
        raise UserError(f"--tasks: needs lm-evaluation-harness ({error}): pip install 'mythos[eval]'") from None
    return harness


def _scorer(ask: Ask, steps: int | None) -> Scorer:
    return lambda requests: ask(Question(requests, steps))


def _writer(ask: Ask, steps: int | None) -> Writer:
    return lambda prompt: ask(Question(prompt, steps))


def _of_source(source: Source, data: RunData, items: Items) -> Items:
    """The names of several sources' items, told apart."""
    return items if len(data.validation) == 1 else {f"{source.name}/{name}": each for name, each in items.items()}


def suffix(steps: int | None) -> str:
    """The end of a metric's name."""
    return "" if steps is None else f"_depth_{steps}"


def _of_rows(
    source: Source,
    sources: int,
    losses: Mapping[str, float],
    depths: Sequence[int | None],
    sequences: int | None,
    tokenizer: Tokenizer | None,
) -> list[Metrics]:
    """At each depth. Bits per byte are those of all targets, BOS included, over the bytes of the text."""
    rows = validation_rows(source.dataset, sequences)
    size = math.nan if tokenizer is None else bytes_in_rows(source.dataset, rows, tokenizer)
    targets = len(rows) * source.dataset.sequence_length
    found = []
    for steps in depths:
        loss = losses[f"val/loss{suffix(steps)}" if sources == 1 else f"val/{source.name}/loss{suffix(steps)}"]
        bits = loss * targets / math.log(2) / size if size else math.nan
        found.append({"loss": loss} | ({} if math.isnan(bits) else {"bits_per_byte": bits}))
    return found


def _named(
    prefix: str, sources: Sequence[Source], depths: Sequence[int | None], measured: Sequence[Sequence[Metrics]]
) -> Metrics:
    """The metrics of all sources: means by weight, and of several sources also those of each."""
    total = math.fsum(source.weight for source in sources)
    found: Metrics = {}
    for number, steps in enumerate(depths):
        each = [of_source[number] for of_source in measured]
        mean = {
            name: math.fsum(source.weight / total * one[name] for source, one in zip(sources, each, strict=True))
            for name in each[0]
            if all(name in one for one in each)
        }
        parts = {prefix: mean}
        if len(sources) > 1:
            parts |= {f"{source.name}/{prefix}": one for source, one in zip(sources, each, strict=True)}
        for start, metrics in parts.items():
            found |= {f"eval/{start}{name}{suffix(steps)}": value for name, value in _complete(metrics).items()}
    return found


def _complete(metrics: Metrics) -> Metrics:
    """With the perplexity, exp(loss)."""
    if "loss" not in metrics:
        return metrics
    loss = metrics["loss"]
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf} | metrics
