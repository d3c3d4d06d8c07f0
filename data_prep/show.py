"""Rows of a prepared data set in readable form."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.tokenizer_file import load_tokenizer
from mythos.data.dataset import TokenDataset
from mythos.data.format import TOKENIZER_FILE, tokenizer_problem
from mythos.errors import UserError


def rows_as_text(directory: Path, split: str, first: int, count: int, as_ids: bool) -> Iterator[str]:
    """For each row a title line and then its text or its token ids.

    Raises UserError if there is no such row, and for text if the tokenizer is not the one that made the ids.
    """
    dataset = TokenDataset(directory, split)
    if not 0 <= first < len(dataset):
        raise UserError(f"--row {first}: the {split} split has rows 0 to {len(dataset) - 1}")
    if count < 1:
        raise UserError(f"--count {count}: give at least 1")
    problem = None if as_ids else tokenizer_problem(directory, dataset.manifest)
    if problem:
        raise UserError(f"{problem}; restore that tokenizer, or show the ids: --ids")
    tokenizer = None if as_ids else load_tokenizer(directory / TOKENIZER_FILE, dataset.manifest.settings.bos)
    for number in range(first, min(first + count, len(dataset))):
        ids = dataset[number].tolist()
        content = tokenizer.encoder.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))
        yield f"--- {split} row {number} of {len(dataset)}, {len(ids)} tokens\n{content}"
