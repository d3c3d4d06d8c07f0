"""Muon's second moments: the update against a slow form, and where the numbers are kept against an enumeration."""

import pytest
import torch
from torch.testing import assert_close

from mythos.engine.exchange import FlatSlice, matrices_of
from mythos.engine.muon import normalise
from mythos.plan.moments import moments_before
from tests.reference.muon import divide


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 8)])
def test_normalised_updates_equal_the_slow_form(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.zeros(2, max(shape))
    slow = torch.zeros(2, max(shape), dtype=torch.double)
    for _ in range(3):
        updates = torch.randn(2, *shape, generator=generator)
        found = normalise(updates, moments, 0.9)
        for update, squares, expected in zip(updates, slow, found, strict=True):
            assert_close(expected.double(), divide(update.double(), squares, 0.9), rtol=1e-5, atol=1e-6)
        assert_close(found.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))
    assert_close(moments.double(), slow, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(found, updates, rtol=0.05), "it is not the same"


def test_matrices_without_an_update_stay_zero() -> None:
    moments = torch.zeros(1, 4)
    assert torch.equal(normalise(torch.zeros(1, 4, 3), moments, 0.95), torch.zeros(1, 4, 3))
    assert torch.equal(moments, torch.zeros(1, 4))


def test_the_rows_of_an_update_become_equally_long() -> None:
    """With a constant update the moments approach its mean squares, whatever they are."""
    update = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[None, :, None]
    moments = torch.zeros(1, 8)
    for _ in range(5):
        found = normalise(update, moments, 0.5)
    lengths = found.norm(dim=2)
    assert_close(lengths, lengths.mean().expand_as(lengths), rtol=1e-4, atol=0)


@pytest.mark.parametrize("matrix", [(4, 3), (3, 4), (3, 3), (1, 5), (5, 1)])
def test_every_moment_is_kept_with_one_element(matrix: tuple[int, int]) -> None:
    rows, columns = matrix
    size, longer = rows * columns, max(rows, columns)
    first = [r * columns for r in range(rows)] if rows >= columns else list(range(columns))
    kept_with = first + [size + element for element in first]
    for element in range(2 * size + 1):
        assert moments_before(matrix, element) == sum(each < element for each in kept_with)
    assert moments_before(matrix, 2 * size) == 2 * longer


def test_where_the_moments_of_a_rank_are() -> None:
    # Elements 10 to 30 of two experts' gate and up (4 matrices of 3 x 4), then a complete matrix of 5 x 2
    slices = [FlatSlice((2, 6, 4), 2, 10, 30, 100), FlatSlice((5, 2), 1, 0, 10, 120)]
    assert [part.moments for part in slices] == [8, 5]
    found = [(m.moments_origin, m.origin) for m in matrices_of(slices)]
    # the first matrix has its 4 columns' moments elsewhere, the second and third are complete, of the fourth none
    assert found == [(-4, 90), (0, 102), (4, 114), (8, 126), (8, 120)]
