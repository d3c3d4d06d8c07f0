"""The rows of a validation split that are measured, as micro batches, shared out over the ranks."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos.data.dataset import TokenDataset
from mythos.data.order import random_order
from mythos.data.targets import counted_targets
from mythos.random_streams import Purpose
from mythos.ranks import group


def validation_rows(dataset: TokenDataset, sequences: int | None) -> np.ndarray:
    """The numbers of the rows to measure, ascending: a random set that only depends on the data, or all of them."""
    if sequences is None or sequences >= len(dataset):
        return np.arange(len(dataset))
    return random_rows(dataset.fingerprint, len(dataset), sequences)


def random_rows(fingerprint: str, available: int, sequences: int) -> np.ndarray:
    """A random set of row numbers, ascending; a smaller set is a part of every larger one."""
    return np.sort(_order(fingerprint, available)[:sequences])


def rows_in_random_order(dataset: TokenDataset) -> np.ndarray:
    """The numbers of all rows, in an order whose beginnings are the sets of ``random_rows``."""
    return _order(dataset.fingerprint, len(dataset))


def _order(fingerprint: str, available: int) -> np.ndarray:
    return random_order(available, int(fingerprint[:16], 16), 0, Purpose.VALIDATION_ROWS, 0)


def validation_batches(
    dataset: TokenDataset, rows: np.ndarray, micro_batch: int, device: torch.device
) -> Iterator[tuple[slice, np.ndarray, Tensor, Tensor]]:
    """This rank's micro batches, read one at a time: place in ``rows``, row numbers, tokens and targets, (B, S) each.

    Every rank has equally many of them, or the collectives would not match: beyond its place, a micro batch repeats the
    last row. A rank reads neighbours, so that it opens each shard once. Collective.

    Raises:
        UserError: a rank cannot read its rows.
    """
    batches = -(-len(rows) // (micro_batch * dist.get_world_size()))
    own = dist.get_rank() * batches * micro_batch
    for first in range(own, own + batches * micro_batch, micro_batch):
        numbers = rows[np.minimum(np.arange(first, first + micro_batch), len(rows) - 1)]
        tokens = group.agree(lambda: dataset.read(numbers))  # noqa: B023
        targets = counted_targets(tokens, dataset.manifest.answers)
        place = slice(first, first + micro_batch)
        yield place, numbers, torch.from_numpy(tokens[:, :-1]).to(device), torch.from_numpy(targets).to(device)
