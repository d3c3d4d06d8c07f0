"""Rows of a prepared data set for a person to read."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.tokenizer_file import load_tokenizer
from mythos.data.dataset import TokenDataset
from mythos.data.format import TOKENIZER_FILE
from mythos.errors import UserError


def rows_as_text(directory: Path, split: str, first: int, count: int, as_ids: bool) -> Iterator[str]:
    """Each row under a line that names it: its text, or its token ids.

    Raises UserError for rows that are not there, and for text where the tokenizer is not the one that made the ids.
    """
    dataset = TokenDataset(directory, split)
    if not 0 <= first < len(dataset):
        raise UserError(f"row {first}: the {split} split has rows 0 to {len(dataset) - 1}")
    if count < 1:
        raise UserError(f"count {count}: give at least 1")
    tokenizer = None if as_ids else load_tokenizer(directory / TOKENIZER_FILE)
    if tokenizer is not None and tokenizer.sha256 != dataset.manifest.tokenizer_sha256:
        raise UserError(
            f"{directory / TOKENIZER_FILE}: not the tokenizer that made the ids; put that one there, or show the ids: "
            "--ids"
        )
    for number in range(first, min(first + count, len(dataset))):
        ids = dataset[number].tolist()
        content = tokenizer.encoder.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))
        yield f"--- {split} row {number} of {len(dataset)}, {len(ids)} tokens\n{content}"
