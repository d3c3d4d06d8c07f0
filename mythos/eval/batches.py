"""The rows of a validation split as micro batches, shared out over the ranks."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos.data.dataset import TokenDataset
from mythos.loss import IGNORED


def validation_batches(
    dataset: TokenDataset, sequences: int, micro_batch: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """This rank's micro batches: number of the first row, tokens, targets, rows that count.

    Every rank has the same number of them, or their collectives would not match: where the rows run out, a row is
    repeated with its targets ignored.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for first in range(rank * micro_batch, _round_up(sequences, ranks * micro_batch), ranks * micro_batch):
        rows = np.stack([dataset[i if i < sequences else 0] for i in range(first, first + micro_batch)])
        count = min(max(sequences - first, 0), micro_batch)
        tokens = torch.from_numpy(rows).to(device)
        targets = tokens[:, 1:].clone()
        targets[count:] = IGNORED
        yield first, tokens[:, :-1], targets, count


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
