"""Synthetic tasks as a data set of the usual shards; the loss counts the answers alone.

A row is a series of examples, BOS question ANSWER answer END, filled up with PAD. In training each example has its own
difficulty, evenly from 1 to the highest trained one. In validation all examples of a row have the same, and the rows
of a difficulty follow each other, so that accuracy can be measured by difficulty, also beyond those trained.

A problem belongs to one split, by the hash of its question: no problem of validation is ever trained.
"""

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_prep.documents import split_of
from data_prep.lock import locked_directory
from data_prep.parts import FREE_SPACE
from data_prep.shards import ShardFormat, encode_shard, write_index
from data_prep.synthetic_tasks import TASKS, Problem, Task
from data_prep.tokenizer_file import TokenizerFile, load_tokenizer
from data_prep.verify import check_existing
from mythos.data.dataset import answer_targets, text_targets
from mythos.data.format import (
    BOS,
    SPLITS,
    TOKENIZER_FILE,
    Answers,
    Manifest,
    Settings,
    SplitCounts,
    Synthetic,
    token_dtype,
)
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import write_atomically

ANSWER, END, PAD = "<|answer|>", "<|end|>", "<|pad|>"
SPECIAL = (BOS, ANSWER, END, PAD)
VALIDATION_PERCENT = 10.0
SHARD_SIZE_MIB = 32
ATTEMPTS = 10_000
"""For a problem of the split that is wanted: there may be none."""


@dataclass(frozen=True)
class Order:
    """What is asked for: rows of each split and the difficulties, which validation has up to ``most``."""

    task: str
    trained: int
    most: int
    rows: int
    validation_rows: int
    """Of each difficulty."""
    sequence_length: int
    seed: int


def make(order: Order, output: Path) -> tuple[Manifest, bool]:
    """Write a data set to ``output``; returns its manifest and whether it is new. The same order gives the same bytes.

    Raises:
        UserError: an example is longer than a row, there is another data set at ``output``, or the disk is full.
    """
    task = TASKS[order.task]
    longest = task.longest(order.most, order.most) + 3
    if longest > order.sequence_length + 1:
        raise UserError(
            f"--sequence-length {order.sequence_length}: an example of difficulty {order.most} has {longest} tokens: "
            f"give at least {longest - 1}"
        )
    output = Path(os.path.realpath(output))  # a directory cannot be renamed over a link
    tokenizer = _tokenizer(task)
    work = output.with_name(f".{output.name}.partial")
    with os_errors_as_user_errors(work, FREE_SPACE), locked_directory(work):
        shutil.rmtree(work / "data", ignore_errors=True)  # of a run that was killed
        data = work / "data"
        data.mkdir()
        write_atomically(data / TOKENIZER_FILE, tokenizer)
        plan = _plan(order, load_tokenizer(data / TOKENIZER_FILE))
        if output.exists():
            manifest, is_new = check_existing(output, plan), False
        else:
            manifest, is_new = replace(plan, splits={split: _write(order, plan, data, split) for split in SPLITS}), True
            manifest.save(data)
            os.rename(data, output)
        shutil.rmtree(work)
    return manifest, is_new


def _tokenizer(task: Task) -> str:
    """Symbols are words between spaces."""
    symbols = [*SPECIAL, *task.symbols]
    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(symbol, special=True) for symbol in SPECIAL])
    return tokenizer.to_str(pretty=True)


def _plan(order: Order, tokenizer: TokenizerFile) -> Manifest:
    ids = tokenizer.encoder.token_to_id
    return Manifest(
        sequence_length=order.sequence_length,
        vocabulary_size=tokenizer.vocabulary_size,
        tokenizer_sha256=tokenizer.sha256,
        sources=(),
        settings=Settings("", VALIDATION_PERCENT, SHARD_SIZE_MIB, content="synthetic"),
        splits={},
        special_ids=tokenizer.special_ids,
        answers=Answers(ids(ANSWER), ids(END)),
        synthetic=Synthetic(order.task, order.trained, order.most, order.rows, order.validation_rows, order.seed),
    )


def _write(order: Order, plan: Manifest, data: Path, split: str) -> SplitCounts:
    """Write the shards of a split."""
    assert plan.answers is not None
    form = ShardFormat(
        plan.encoding,
        plan.row_tokens * np.dtype(token_dtype(plan.vocabulary_size)).itemsize,
        plan.settings.shard_size_mib << 20,
        None,
    )
    (data / split).mkdir()
    vocabulary = load_tokenizer(data / TOKENIZER_FILE).encoder.get_vocab()
    rows = _rows(order, vocabulary, split)
    entries: list[dict[str, Any]] = []
    sequences = examples = targets = counted = 0
    while chosen := list(itertools.islice(rows, form.rows_a_shard)):
        tokens = np.stack(chosen).astype(token_dtype(plan.vocabulary_size))
        name, content, entry = encode_shard(form, len(entries), tokens)
        write_atomically(data / split / name, content)
        entries.append(entry)
        sequences += len(tokens)
        examples += int((tokens == vocabulary[ANSWER]).sum())
        targets += text_targets(tokens, plan.special_ids or ())
        counted += int(answer_targets(tokens, plan.answers).sum())
    write_index(data / split, entries)
    return SplitCounts(
        documents=examples,
        text_bytes=None,
        sequences=sequences,
        tokens=sequences * plan.row_tokens,
        tokens_dropped=0,
        documents_cut=0,
        positions=sequences * plan.sequence_length,
        text_tokens=targets,
        counted_targets=counted,
    )


def _rows(order: Order, vocabulary: Mapping[str, int], split: str) -> Iterator[list[int]]:
    """The rows of a split, each ``sequence_length + 1`` ids."""
    difficulties = range(1, order.most + 1)
    count = order.rows if split == "train" else order.validation_rows * len(difficulties)
    for row in range(count):
        random = np.random.default_rng([order.seed, SPLITS.index(split), row])
        ids: list[int] = []
        while True:
            difficulty = int(random.integers(1, order.trained + 1))
            if split == "validation":
                difficulty = difficulties[row // order.validation_rows]
            question, answer = _problem(order, random, difficulty, split)
            example = [vocabulary[symbol] for symbol in (BOS, *question, ANSWER, *answer, END)]
            if len(ids) + len(example) > order.sequence_length + 1:
                break
            ids += example
        yield ids + [vocabulary[PAD]] * (order.sequence_length + 1 - len(ids))


def _problem(order: Order, random: np.random.Generator, difficulty: int, split: str) -> Problem:
    """A problem that belongs to this split."""
    for _ in range(ATTEMPTS):
        problem = TASKS[order.task].make(random, difficulty, order.most)
        if split_of(" ".join(problem.question), VALIDATION_PERCENT) == split:
            return problem
    raise UserError(f"--task {order.task}: no problem of difficulty {difficulty} is in the {split} split")
