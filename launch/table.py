"""Tables: drawn by rich on a terminal, plain aligned columns elsewhere."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mythos.errors import printable

COLUMN_GAP = "  "
BORDER = 3
"""What a column of a table on a terminal takes beside its text."""
WRAPPED_CHARACTERS = 24
"""Text is not wrapped to less than this to make room for another column."""


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are aligned on the right and never wrapped."""

    header: str
    is_number: bool = False
    if_it_fits: int | None = None
    """A column with such a number is left out where the terminal is too narrow; small numbers are shown first."""


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows to stdout.

    If stdout is not a terminal, there are no headers, boxes, colours or wrapped lines: each row is one line, and two or
    more spaces separate its cells.
    """
    rows = [[_cell(text) for text in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    for line in plain_lines(columns, rows):
        print(line)


def _cell(text: str) -> str:
    """A text on one line: it may come from a file, and must not look like another row."""
    return printable("; ".join(text.splitlines()))


def plain_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each row, columns aligned."""
    widths = [max((len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        lines.append(COLUMN_GAP.join(cells).rstrip())
    return lines


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = shown_columns(columns, rows, console.width)
    table = Table(box=box.SIMPLE_HEAD, show_header=any(column.header for column in columns))
    for column in (columns[index] for index in shown):
        table.add_column(
            column.header,
            justify="right" if column.is_number else "left",
            overflow="fold",
            no_wrap=column.is_number,
        )
    for row in rows:
        # Text, because a cell may contain what rich takes for markup.
        table.add_row(*(Text(row[index]) for index in shown))
    console.print(table)


def shown_columns(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns to show on a terminal of ``width`` characters, in order."""

    def needed(index: int) -> int:
        longest = max(len(cell) for cell in (columns[index].header, *(row[index] for row in rows)))
        return BORDER + (longest if columns[index].is_number else min(longest, WRAPPED_CHARACTERS))

    ranks = {index: column.if_it_fits for index, column in enumerate(columns)}
    shown = [index for index, rank in ranks.items() if rank is None]
    left = width - sum(needed(index) for index in shown)  # may be negative: rich then wraps the text further
    for _, index in sorted((rank, index) for index, rank in ranks.items() if rank is not None):
        if needed(index) <= left:
            left -= needed(index)
            shown.append(index)
    return sorted(shown)
