from itertools import pairwise

import numpy as np
import pytest

from data_prep.packing import BestFitPacker, Piece, StraightPacker
from tests.reference.packing import SlowBestFit


def documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents of distinct tokens, so that a row shows which documents it contains."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(1 + generator.exponential(longest / 4, size=count).astype(int), longest)
    starts = np.cumsum([0, *lengths[:-1]])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


def pack(packer, given: list[list[int]]) -> tuple[list[list[int]], list[Piece]]:
    rows = [row for document in given for row in packer.add(Piece(np.array(document, dtype=np.uint32)))]
    last_rows, left = packer.finish()
    return [row.tolist() for row in (*rows, *last_rows)], left


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("row_tokens", "longest", "buffer_tokens"), [(16, 60, 64), (16, 14, 200), (33, 30, 330), (5, 5, 1)]
)
def test_best_fit_follows_its_rules(seed: int, row_tokens: int, longest: int, buffer_tokens: int):
    given = documents(seed, 150, longest)
    slow = SlowBestFit(row_tokens, buffer_tokens)
    expected = [row for document in given for row in slow.add(document)] + slow.finish()
    fast = BestFitPacker(row_tokens, buffer_tokens)
    rows, left = pack(fast, given)
    assert rows == expected
    assert fast.documents_cut == slow.cut
    assert sorted(piece.tokens.tolist() for piece in left) == sorted(slow.remainders + slow.documents)


@pytest.mark.parametrize("packer", [StraightPacker(16), BestFitPacker(16, 100)])
def test_no_token_is_lost_and_cut_documents_are_counted(packer):
    given = documents(7, 300, 50)
    rows, left = pack(packer, given)
    assert all(len(row) == 16 for row in rows)
    kept = [token for row in rows for token in row] + [token for piece in left for token in piece.tokens.tolist()]
    assert sorted(kept) == list(range(sum(map(len, given))))
    assert sum(len(piece.tokens) for piece in left) < 16
    row_of = {token: number for number, row in enumerate(rows) for token in row}
    cut = sum(len({row_of.get(token) for token in document}) > 1 for document in given)
    assert packer.documents_cut == cut > 0


def test_a_text_continues_after_its_own_beginning_or_at_the_start_of_a_row():
    given = documents(3, 400, 40)
    rows, _ = pack(BestFitPacker(16, 200), given)
    beginnings = {document[0] for document in given}
    for row in rows:
        for before, token in pairwise(row):
            assert token in beginnings or token == before + 1


def test_straight_rows_are_the_documents_end_to_end():
    rows, (left,) = pack(StraightPacker(4), [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12, 13]])
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert left.tokens.tolist() == [12, 13]
    assert left.continues
    exact = StraightPacker(4)
    assert pack(exact, [[0, 1], [2, 3], [4]])[1] == [Piece(np.array([4]), continues=False)]
    assert exact.documents_cut == 0


def test_best_fit_cuts_fewer_documents():
    given = documents(11, 3000, 250)
    cut = {}
    for packer in (StraightPacker(257), BestFitPacker(257, 20_000)):
        pack(packer, given)
        cut[type(packer).__name__] = packer.documents_cut
    assert cut["BestFitPacker"] < cut["StraightPacker"] / 10
