"""`mythos data tokenizer`: train a byte-level BPE tokenizer."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from mythos.errors import DONE, UserError

DEFAULT_VALIDATION_PERCENT = 1.0  # spelled here and not in data_prep, so that the help need not import pyarrow
DEFAULT_SAMPLE_MB = 500.0
DEFAULT_DIGITS = 2  # with 32,768 ids, every number of three digits would take 1,000 of them

_ValidationPercent = Annotated[
    float,
    typer.Option(
        metavar="PERCENT",
        help="share of the documents, chosen by the hash of their text, to hold out; `data prepare` keeps the same "
        "documents for validation",
    ),
]
_SpecialToken = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN",
        help="reserve an id for this token after <|bos|>, for example '<|user|>' for a later chat format; may be "
        "repeated. Training needs none but <|bos|>",
    ),
]
_SampleMb = Annotated[
    float | None,
    typer.Option(
        metavar="MB",
        help="text to train on, taken from all parts of the sources; 100 MB take about 40 s and 0.75 GB (default: "
        f"{DEFAULT_SAMPLE_MB})",
    ),
]
_SampleCharacters = Annotated[
    int | None, typer.Option(metavar="NUMBER", min=1, help="the same in characters, instead of --sample-mb")
]
_DocumentCharacters = Annotated[
    int | None,
    typer.Option(metavar="NUMBER", min=1, help="characters of each document to train on at most (default: all)"),
]
_SplitPattern = Annotated[
    Literal["gpt2", "gpt4"],
    typer.Option(help="how text is split into words, within which tokens are formed: as for GPT-2 or GPT-4"),
]
_Digits = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=2,
        max=3,
        help="digits of a number that form a word at most, with --split-pattern gpt4; GPT-4 itself has 3 (default: "
        f"{DEFAULT_DIGITS})",
    ),
]


def run(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE.parquet", help="Parquet files with the text")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="tokenizer.json to write; an existing one is replaced")],
    column: Annotated[str, typer.Option(help="column with the text, one document per row")] = "text",
    validation_percent: _ValidationPercent = DEFAULT_VALIDATION_PERCENT,
    vocabulary_size: Annotated[int, typer.Option(metavar="TOKENS", help="at least 257")] = 32768,
    special_token: _SpecialToken = None,
    sample_mb: _SampleMb = None,
    sample_characters: _SampleCharacters = None,
    document_characters: _DocumentCharacters = None,
    split_pattern: _SplitPattern = "gpt2",
    digits: _Digits = None,
) -> int:
    """Train a byte-level BPE tokenizer.

    Trains on the train split of the text; the same text gives the same file. The file FILE.training.json (FILE without
    its suffix) records what was held out.
    """
    if sample_mb is not None and sample_characters is not None:
        raise UserError(f"--sample-characters {sample_characters}: leave out --sample-mb, which is another measure")
    if digits is not None and split_pattern != "gpt4":
        raise UserError(f"--digits {digits}: has an effect only with --split-pattern gpt4")
    from data_prep.train_tokenizer import SampleSize, train_tokenizer

    size_bytes = (DEFAULT_SAMPLE_MB if sample_mb is None else sample_mb) * 1e6
    started = time.monotonic()
    trained_size, note = train_tokenizer(
        sources=sources,
        column=column,
        vocabulary_size=vocabulary_size,
        output=output,
        validation_percent=validation_percent,
        sample_size=SampleSize(sample_characters or size_bytes, sample_characters is not None, document_characters),
        special_tokens=special_token or [],
        gpt4_digits=digits or DEFAULT_DIGITS if split_pattern == "gpt4" else None,
    )
    held_out = (
        f"{note.bytes_per_token:.3f} bytes/token on {note.held_out_bytes / 1e6:.2f} MB held out"
        if note.bytes_per_token
        else "no document of the sample was held out to measure bytes/token on"
    )
    print(
        f"{output}: {trained_size:,} tokens from {note.text_bytes / 1e6:.1f} MB; {held_out}; "
        f"{time.monotonic() - started:.1f} s"
    )
    return DONE
