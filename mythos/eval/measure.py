"""What is measured of a checkpoint beside its validation losses; the work of rank 0, which asks all ranks for scores.

Text is measured in two ways (docs/metrics.md): ``rows``, packed as in training, where BOS is predicted as well; and
``documents``, each alone (``mythos.eval.documents``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from mythos.data.open import RunData, read_tokenizer
from mythos.data.stream import Source
from mythos.errors import UserError
from mythos.eval.answers import accuracies
from mythos.eval.batches import validation_rows
from mythos.eval.documents import bytes_in_rows, read_documents
from mythos.eval.requests import Request, Score, Scorer
from mythos.run.console import log

Metrics = dict[str, float]


@dataclass(frozen=True)
class Scoring:
    """Requests for all ranks at a number of loop steps; None for a dense model."""

    requests: Sequence[Request]
    steps: int | None


Ask = Callable[[Scoring], list[Score]]


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the validation losses.

    ``documents`` of each source are measured, None for all, 0 for none; ``with_bos``: see ``mythos.eval.documents``.
    """

    documents: int | None = 1000
    with_bos: bool = True


def text_metrics(
    ask: Ask,
    data: RunData,
    losses: Mapping[str, float],
    depths: Sequence[int | None],
    sequences: int | None,
    wanted: Wanted,
) -> Metrics:
    """Loss, perplexity and bits per byte at each depth, of rows and of documents.

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
    if data.validation[0].dataset.manifest.answers is not None:
        solved = [[accuracies(source.dataset, _scorer(ask, steps)) for steps in depths] for source in data.validation]
        found |= _named("", data.validation, depths, solved)
    elif tokenizer is not None and wanted.documents != 0:
        of_sources = []
        for source in data.validation:
            text = read_documents(source.dataset, tokenizer, bos, wanted.documents, wanted.with_bos)
            of_sources.append([text.measure(_scorer(ask, steps)) for steps in depths])
        found |= _named("documents_", data.validation, depths, of_sources)
    return found


def _scorer(ask: Ask, steps: int | None) -> Scorer:
    return lambda requests: ask(Scoring(requests, steps))


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
