"""Training a byte-level BPE tokenizer on a sample of the train split.

Byte-level: every text can be encoded and decodes to itself, so there is no unknown token. The merges, and so the file,
depend on the sources and settings alone, not on the number of threads.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.documents import RowRange, check_validation_percent, split_of
from data_prep.encoding import GPT_4, can_be_cut, encode
from data_prep.progress import Progress
from data_prep.sources import expanded, report_empty
from data_prep.text_files import text_file
from data_prep.tokenizer_file import TrainingNote
from mythos.data.format import BOS
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import write_atomically

_BYTES = 256
# A visit to a row range yields at least this much, so that a small sample of a large corpus needs few visits.
_LEAST_VISIT_BYTES = 4 << 20
_HELD_OUT_BYTES = 8 << 20
# How much more is read after the sample is full to find a held-out document to measure on.
_FURTHER_BYTES = 256 << 20


@dataclass(frozen=True)
class SampleSize:
    """How much text a tokenizer is trained on."""

    limit: float = float("inf")
    """Bytes of UTF-8, or characters."""
    in_characters: bool = False
    document_characters: int | None = None
    """Of each document, at most so many characters from its beginning; None: all of them."""


def train_tokenizer(
    sources: list[Path],
    column: str,
    vocabulary_size: int,
    output: Path,
    validation_percent: float,
    sample_size: SampleSize = SampleSize(),
    special_tokens: Sequence[str] = (),
    gpt4_digits: int | None = None,
) -> tuple[int, TrainingNote]:
    """Write a tokenizer file and its note; returns the note and the vocabulary size.

    The vocabulary is smaller than asked for if the text has too few pairs. BOS has id 0, and the other special tokens
    follow in their order. Only documents of the train split are used, so validation text does not influence the
    vocabulary. Memory and time are bounded by the sample.

    Args:
        gpt4_digits: split the text into words by the pattern of GPT-4, with numbers in groups of at most so many
            digits; None: by that of GPT-2, in which a number is one word.

    Raises:
        UserError: an unusable source or setting, a full disk, or no document is in the train split.
    """
    _check(vocabulary_size, validation_percent, sample_size, special_tokens)
    _check_output(output)
    sources = expanded(sources)
    ranges_of_sources = [text_file(source, column, "text").row_ranges() for source in sources]
    report_empty(sources, ranges_of_sources)
    ranges = [rows for source_ranges in ranges_of_sources for rows in source_ranges]
    total_bytes = sum(rows.bytes for rows in ranges)
    sample = _Sample(ranges, column, validation_percent, sample_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitter(gpt4_digits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, *special_tokens],
        # All 256 bytes, including those that do not occur in the text.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with Progress("reading the sample", int(min(sample_size.limit, total_bytes))) as progress:
        tokenizer.train_from_iterator(sample.train_texts(progress), trainer=trainer)
    if not sample.train_bytes:
        names = ", ".join(str(source) for source in sources)
        raise UserError(f"{names}: no text for the train split; give more documents or a lower --validation-percent")
    content = tokenizer.to_str(pretty=True)
    note = TrainingNote(
        tokenizer_sha256=hashlib.sha256(content.encode()).hexdigest(),
        validation_percent=float(validation_percent),
        text_bytes=sample.train_bytes,
        held_out_bytes=sum(len(text.encode()) for text in sample.held_out),
        held_out_tokens=sum(len(ids) for ids in encode(tokenizer, sample.held_out, can_be_cut(tokenizer))),
    )
    with _writing(output):
        write_atomically(output, content)
        note.save(output)
    return tokenizer.get_vocab_size(), note


def _splitter(gpt4_digits: int | None) -> pre_tokenizers.PreTokenizer:
    if gpt4_digits is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Split(Regex(GPT_4[gpt4_digits]), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _check(
    vocabulary_size: int, validation_percent: float, sample_size: SampleSize, special_tokens: Sequence[str]
) -> None:
    least = _BYTES + 1 + len(special_tokens)
    if vocabulary_size < least:
        raise UserError(
            f"--vocabulary-size {vocabulary_size}: give at least {least}, the {_BYTES} bytes, {BOS}"
            + (f" and {len(special_tokens)} special tokens" if special_tokens else "")
        )
    check_validation_percent(validation_percent)
    if not sample_size.limit > 0:
        option, limit = "characters" if sample_size.in_characters else "mb", sample_size.limit
        raise UserError(
            f"--sample-{option} {limit if option == 'characters' else limit / 1e6:g}: give a number above 0"
        )
    for token in special_tokens:
        if not token or [BOS, *special_tokens].count(token) > 1:
            raise UserError(f"--special-token {token!r}: give each token once, not empty and not {BOS}")


def _check_output(output: Path) -> None:
    """Check before the long work that the file can be written."""
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=output.parent).close()


def _writing(output: Path) -> AbstractContextManager[None]:
    return os_errors_as_user_errors(output, "free space or choose another --output")


class _Sample:
    """Documents from the whole corpus: the first documents of its row ranges, which are visited in random order.

    Each range contributes its share of the sample, but at least _LEAST_VISIT_BYTES. A corpus that is smaller than the
    sample is used completely. Only the bytes of a range are known beforehand, so with a limit in characters, ranges
    with several bytes a character contribute more than their share.
    """

    def __init__(self, ranges: list[RowRange], column: str, validation_percent: float, size: SampleSize) -> None:
        self.train_bytes = 0
        self.held_out: list[str] = []
        self._column, self._validation_percent, self._size = column, validation_percent, size
        self._share = size.limit / max(sum(rows.bytes for rows in ranges), 1)
        if self._share < 1:
            # A fixed seed, so that the same corpus gives the same sample.
            order = np.random.Generator(np.random.Philox(0)).permutation(len(ranges))
            ranges = [ranges[number] for number in order]
        self._ranges = ranges

    def train_texts(self, progress: Progress) -> Iterator[str]:
        """The texts to train on; those of the validation split are added to ``held_out``."""
        used = held_out_bytes = further_bytes = 0
        for rows in self._ranges:
            visited = 0
            for text in text_file(Path(rows.source), self._column, "text").texts(rows):
                content = text.encode()
                beginning = text[: self._size.document_characters]
                size = len(beginning) if self._size.in_characters else len(beginning.encode())
                visited += size
                is_full = used >= self._size.limit
                if split_of(content, self._validation_percent) == "validation":
                    if held_out_bytes < _HELD_OUT_BYTES:
                        held_out_bytes += len(content)
                        self.held_out.append(text)
                elif is_full:
                    further_bytes += len(content)
                else:
                    used += size
                    self.train_bytes += len(beginning.encode())
                    progress(size)
                    yield beginning
                if is_full and (self.held_out or further_bytes >= _FURTHER_BYTES):
                    return
                if self._share < 1 and visited >= max(self._share * rows.bytes, _LEAST_VISIT_BYTES):
                    break
