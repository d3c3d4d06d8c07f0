"""`mythos data show`: rows of a prepared data set."""

from typing import Annotated, Literal

import typer

from launch.data_verify import DataDirectory
from mythos.errors import DONE, printable


def run(
    directory: DataDirectory,
    split: Annotated[Literal["train", "validation"], typer.Option(help="which split to show")] = "train",
    row: Annotated[int, typer.Option(metavar="N", help="the first row to show")] = 0,
    count: Annotated[int, typer.Option(metavar="ROWS", help="how many rows to show")] = 2,
    ids: Annotated[bool, typer.Option("--ids", help="print the token ids instead of the text")] = False,
) -> int:
    """Print rows of a prepared data set as text."""
    from data_prep.show import rows_as_text

    for text in rows_as_text(directory, split, row, count, ids):
        print(printable(text))
    return DONE
