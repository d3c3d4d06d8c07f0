"""Muon's second moments: how many there are, and which elements of a matrix they are kept with."""

SECOND_MOMENT = "second_moment"
"""Name of the state tensor: one-dimensional, the second moments that are kept with some elements of a parameter."""


def moments_before(matrix: tuple[int, int], element: int) -> int:
    """How many second moments are kept with the elements before ``element`` of matrices (R, C) laid end to end.

    A matrix has one for each row, or for each column if these are more. That of a row is kept with the row's first
    element, that of a column with the column's first. So whoever has a range of elements also has a range of second
    moments, each of which has one place only.
    """
    rows, columns = matrix
    number, inside = divmod(element, rows * columns)
    return number * max(rows, columns) + (-(-inside // columns) if rows >= columns else min(inside, columns))
