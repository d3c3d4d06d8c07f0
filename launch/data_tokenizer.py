"""`mythos data tokenizer`: train a byte-level BPE tokenizer."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mythos.errors import DONE

DEFAULT_VALIDATION_PERCENT = 1.0  # spelled here and not in data_prep, so that the help need not import pyarrow


def run(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE.parquet", help="Parquet files with the text")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="tokenizer.json to write; an existing one is replaced")],
    column: Annotated[str, typer.Option(help="column with the text, one document per row")] = "text",
    validation_percent: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="share of the documents, chosen by the hash of their text, to hold out; `data prepare` keeps the same "
            "documents for validation",
        ),
    ] = DEFAULT_VALIDATION_PERCENT,
    vocabulary_size: Annotated[int, typer.Option(metavar="TOKENS", help="at least 257")] = 32768,
    special_token: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="reserve an id for this token after <|bos|>, for example '<|user|>' for a later chat format; may be "
            "repeated. Training needs none but <|bos|>",
        ),
    ] = None,
    sample_mb: Annotated[
        float,
        typer.Option(
            metavar="MB",
            help="text to train on, taken from all parts of the sources; 100 MB take about 40 s and 0.75 GB",
        ),
    ] = 500.0,
) -> int:
    """Train a byte-level BPE tokenizer.

    Trains on the train split of the text; the same text gives the same file. The file FILE.training.json (FILE without
    its suffix) records what was held out.
    """
    from data_prep.train_tokenizer import train_tokenizer

    started = time.monotonic()
    trained_size, note = train_tokenizer(
        sources=sources,
        column=column,
        vocabulary_size=vocabulary_size,
        output=output,
        validation_percent=validation_percent,
        sample_bytes=sample_mb * 1e6,
        special_tokens=special_token or [],
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
