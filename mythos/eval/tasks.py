"""Tasks from local files, scored as CORE does (DataComp-LM, arXiv 2406.11794): JSON lines, one item each.

    kind             item                                               correct if
    multiple_choice  query, choices, gold (number of the right one)     its choice has the largest mean of log p
    schema           context_options, continuation, gold                the same of the continuation after its context
    continuation     context, continuation                              each token of it is the likeliest one

    centred accuracy = (accuracy - chance) / (1 - chance)               CORE = its mean over the tasks

Only the tokens count in which the choices differ (``multiple_choice``), or those in which they agree at the end
(``schema``). The examples before an item are other items, drawn as in nanochat, whose CORE these results are comparable
with: the items are shuffled with seed 1337, and item n draws its examples with seed 1234 + n.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field, TypeAdapter
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from mythos.config.yaml_file import parse
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.eval.requests import Scorer, in_parts, windows
from mythos.files import open_regular
from mythos.readers import LINE_BYTES, Count, parse_json, read_utf8, read_yaml

Answer = Annotated[str, Field(min_length=1)]
REMEDY = "see configs/eval/core.yaml for the form of a list of tasks"
ITEMS_SEED, EXAMPLES_SEED = 1337, 1234
ITEMS_AT_ONCE = 512
BETWEEN = "\n\n"


class Task(TypedDict):
    """One task of a list: its file, relative to the directory of the data, and how it is shown to the model."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    file: str
    kind: Literal["multiple_choice", "schema", "continuation"]
    examples: Annotated[int, Field(ge=0, le=1000)]
    chance: Annotated[float, Field(ge=0, lt=1)]
    delimiter: NotRequired[str]
    """Between context and continuation; a space if it is not given."""


class TaskList(TypedDict):
    """A file of tasks; the mean of their centred accuracies is reported under its name."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    tasks: Annotated[list[Task], Field(min_length=1)]


class _MultipleChoice(TypedDict):
    query: str
    choices: Annotated[list[Answer], Field(min_length=2)]
    gold: Count


class _Schema(TypedDict):
    context_options: Annotated[list[str], Field(min_length=2)]
    continuation: Answer
    gold: Count


class _Continuation(TypedDict):
    context: str
    continuation: Answer


_LIST = TypeAdapter(TaskList)
_ITEMS: dict[str, TypeAdapter[Any]] = {
    "multiple_choice": TypeAdapter(_MultipleChoice),
    "schema": TypeAdapter(_Schema),
    "continuation": TypeAdapter(_Continuation),
}


@dataclass(frozen=True)
class Accuracy:
    """The result of a task."""

    accuracy: float
    centred: float
    standard_error: float
    """Of the accuracy: sqrt(a (1 - a) / (n - 1))."""
    items: int


@dataclass(frozen=True)
class Alternative:
    """The text of an item with one of its answers, as tokens, of which those from ``first`` on count."""

    tokens: list[int]
    first: int


def is_list(path: Path) -> bool:
    """Whether a file holds a list of tasks; one of lm-evaluation-harness has no key `tasks`. Raises UserError."""
    return path.suffix == ".yaml" and re.search("^tasks:", read_utf8(path, REMEDY), re.MULTILINE) is not None


def read_tasks(path: Path) -> TaskList:
    """A list of tasks. Raises UserError."""
    return read_yaml(path, parse, _LIST, REMEDY)


def read_items(path: Path, kind: str, limit: int | None) -> list[Any]:
    """The items of a task, shuffled; the first ``limit``, None for all.

    Raises:
        UserError: the file cannot be read, or a line holds no item of this kind.
    """
    found, remedy = [], f"give items of the kind {kind} (see mythos/eval/tasks.py)"
    with os_errors_as_user_errors(path, "name its directory with --task-data"), open_regular(path) as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            item = parse_json(f"{path}: line {number}", line, _ITEMS[kind], remedy)
            if kind != "continuation" and item["gold"] >= len(_answers(item)):
                raise UserError(f"{path}: line {number}: gold is {item['gold']} of {len(_answers(item))}: {remedy}")
            found.append(item)
    if not found:
        raise UserError(f"{path}: no items: {remedy}")
    random.Random(ITEMS_SEED).shuffle(found)
    return found[:limit]


def accuracy(
    task: Task, items: Sequence[Any], tokenizer: Tokenizer, bos: int, longest: int, scorer: Scorer
) -> Accuracy:
    """The accuracy of a model on the items."""
    right = 0
    for first in range(0, len(items), ITEMS_AT_ONCE):
        numbers = range(first, min(first + ITEMS_AT_ONCE, len(items)))
        alternatives = [_alternatives(task, items, number, tokenizer, bos) for number in numbers]
        scores = _score([each for those in alternatives for each in those], longest, scorer)
        for number, those in zip(numbers, alternatives, strict=True):
            own = [next(scores) for _ in those]
            if task["kind"] == "continuation":
                right += own[0][1]
            else:
                right += max(range(len(own)), key=lambda answer: own[answer][0]) == items[number]["gold"]
    share = right / len(items)
    error = math.sqrt(share * (1 - share) / (len(items) - 1)) if len(items) > 1 else math.nan
    return Accuracy(share, (share - task["chance"]) / (1 - task["chance"]), error, len(items))


def _score(alternatives: Sequence[Alternative], longest: int, scorer: Scorer) -> Iterator[tuple[float, bool]]:
    """Mean log p of each alternative's tokens that count, and whether all are the likeliest."""
    parts = [windows(each.tokens, each.first, longest) for each in alternatives]
    scores = iter([score for part in in_parts([one for those in parts for one in those]) for score in scorer(part)])
    for those in parts:
        own = [next(scores) for _ in those]
        yield float(np.concatenate([each.log_probabilities for each in own]).mean()), all(each[1] for each in own)


def _alternatives(task: Task, items: Sequence[Any], number: int, tokenizer: Tokenizer, bos: int) -> list[Alternative]:
    delimiter, item = task.get("delimiter", " "), items[number]
    others = len(items) - 1
    drawn = random.Random(EXAMPLES_SEED + number).sample(range(others), min(task["examples"], others))
    before = "".join(_solved(items[other + (other >= number)], delimiter) + BETWEEN for other in drawn)
    if task["kind"] == "continuation":
        question = f"{before}{item['context'].strip()}{delimiter}"
        texts = [question.strip(), question + item["continuation"]]
    else:
        texts = [f"{before}{answer}" for answer in _answers(item, delimiter)]
    tokens = [[bos, *each.ids] for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if task["kind"] == "continuation":
        return [Alternative(tokens[1], _before_last(_same(tokens), tokens[1]))]
    if task["kind"] == "schema":
        agreeing = _same([ids[::-1] for ids in tokens])
        return [Alternative(ids, max(1, _before_last(len(ids) - agreeing, ids))) for ids in tokens]
    return [Alternative(ids, _before_last(_same(tokens), ids)) for ids in tokens]


def _before_last(first: int, tokens: list[int]) -> int:
    """``first``, or the last token if none would count: an answer may be the beginning of another one."""
    return min(first, len(tokens) - 1)


def _same(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def _answers(item: Any, delimiter: str = " ") -> list[str]:
    """The item with each of its answers."""
    if "choices" in item:
        return [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    return [f"{context}{delimiter}{item['continuation']}" for context in item["context_options"]]


def _solved(item: Any, delimiter: str) -> str:
    if "gold" in item:
        return _answers(item, delimiter)[item["gold"]]
    return f"{item['context'].strip()}{delimiter}{item['continuation']}"
