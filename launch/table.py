"""Tables: drawn by rich on a terminal, plain aligned columns elsewhere."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

COLUMN_GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are aligned on the right."""

    header: str
    is_number: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows to stdout.

    If stdout is not a terminal, there are no headers, boxes, colours or wrapped lines: each row is one line, and two or
    more spaces separate its cells.
    """
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    for line in plain_lines(columns, rows):
        print(line)


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

    table = Table(box=box.SIMPLE_HEAD, show_header=any(column.header for column in columns))
    for column in columns:
        table.add_column(column.header, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, because a cell may contain what rich takes for markup
    Console().print(table)
