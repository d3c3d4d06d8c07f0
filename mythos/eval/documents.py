"""Loss, perplexity and bits per byte of whole documents, each alone.

    loss = sum of -log p over all documents / their tokens          bits per byte = the same sum / (log 2 * their bytes)

Of each document its first ``sequence_length + 1`` tokens count. It begins with BOS, as in training, which is given and
not predicted; or ``with_bos=False`` with its first token of text, as in the published code of arXiv 2604.12946. Special
tokens are not counted, neither their probabilities nor their bytes.
"""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from mythos.data.dataset import TokenDataset
from mythos.data.text_bytes import text_bytes_of_ids
from mythos.eval.batches import rows_in_random_order
from mythos.eval.requests import Request, Scorer, in_parts

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Text:
    """Documents as requests, with the bytes of each token that counts.

    A special token has 0 bytes. For a tokenizer that is not byte-level, every other one has NaN.
    """

    requests: list[Request]
    bytes_of: list[np.ndarray]

    def nats(self, scorer: Scorer) -> np.ndarray:
        """-log p of the tokens that count, of each document."""
        scores = [score for part in in_parts(self.requests) for score in scorer(part)]
        pairs = zip(scores, self.bytes_of, strict=True)
        return np.array([-math.fsum(score.log_probabilities[bytes_of != 0]) for score, bytes_of in pairs])

    def items(self) -> dict[str, np.ndarray]:
        """Of each document its number in the data, the tokens that count, and their bytes."""
        return {
            "documents": np.array([request.state_seed for request in self.requests]),
            "documents_tokens": np.array([(bytes_of != 0).sum() for bytes_of in self.bytes_of]),
            "documents_bytes": np.array([bytes_of.sum() for bytes_of in self.bytes_of]),
        }

    def metrics(self, nats_N: np.ndarray) -> dict[str, float]:
        """Loss and bits per byte by name; none without a token to count, no bits per byte where bytes are unknown."""
        items, nats = self.items(), math.fsum(nats_N)
        tokens, size = items["documents_tokens"].sum(), items["documents_bytes"].sum()
        if not tokens:
            return {}
        found = {"loss": nats / float(tokens)}
        return found if math.isnan(size) else found | {"bits_per_byte": nats / math.log(2) / float(size)}


def read_documents(
    dataset: TokenDataset, tokenizer: Tokenizer, bos: int, documents: int | None, with_bos: bool
) -> Text:
    """A random set of documents that only depends on the data, or all; a smaller set is a part of a larger one.

    They are those that begin in rows chosen at random. A document goes on in the following rows, until the next one
    begins; where a packing puts the rest of a cut document elsewhere, it is not found.

    Raises:
        UserError: a shard is missing or damaged.
    """
    sizes = byte_counts(tokenizer)
    found = Text([], [])
    for row, position in _starts(dataset, bos, documents):
        tokens = _read(dataset, row, position, bos, dataset.sequence_length + 1 + (not with_bos))
        seed = row * (dataset.sequence_length + 1) + position
        request = Request(tokens[0 if with_bos else 1 :].astype(np.int32), 1, seed)
        if len(request.tokens) > 1:
            found.requests.append(request)
            found.bytes_of.append(sizes[request.tokens[1:]])
    return found


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text of each id, as in ``Text``."""
    sizes = text_bytes_of_ids(tokenizer)
    if sizes is not None:
        return sizes.astype(np.float64)
    unknown = np.full(max(tokenizer.get_vocab().values()) + 1, math.nan)
    unknown[[number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = 0
    return unknown


def bytes_in_rows(dataset: TokenDataset, rows: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of the rows' targets; NaN for a tokenizer that is not byte-level."""
    sizes = byte_counts(tokenizer)
    parts = (rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE))
    return math.fsum(sizes[dataset.read(part)[:, 1:]].sum() for part in parts)


def _starts(dataset: TokenDataset, bos: int, documents: int | None) -> list[tuple[int, int]]:
    """Row and position of the first token of each chosen document, in the order of the data."""
    rows = np.arange(len(dataset)) if documents is None else rows_in_random_order(dataset)
    found: list[tuple[int, int]] = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[first : first + ROWS_AT_ONCE]
        numbers, positions = np.nonzero(dataset.read(part) == bos)
        found += zip(part[numbers].tolist(), positions.tolist(), strict=True)
        if documents is not None and len(found) >= documents:
            break
    return sorted(islice(found, documents))


def _read(dataset: TokenDataset, row: int, position: int, bos: int, longest: int) -> np.ndarray:
    tokens = dataset[row][position:]
    while (ends := np.flatnonzero(tokens[1:] == bos)).size == 0 and len(tokens) < longest and row + 1 < len(dataset):
        row += 1
        tokens = np.concatenate((tokens, dataset[row]))
    end = int(ends[0]) + 1 if ends.size else len(tokens)
    return tokens[: min(end, longest)]
