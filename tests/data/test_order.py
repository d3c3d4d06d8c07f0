import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mythos.data.order import Order

SHARDS = (20, 20, 1, 20, 13, 20, 9)
ROWS = sum(SHARDS)
SHARD_OF_ROW = np.repeat(np.arange(len(SHARDS)), SHARDS)


def epoch(order: Order, number: int) -> list[int]:
    return order.indices(number * order.rows, order.rows).tolist()


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 7, 32])
def test_every_epoch_reads_every_row_once_in_an_order_of_its_own(shuffle_shards: int) -> None:
    orders = [epoch(Order(SHARDS, seed, shuffle_shards), number) for seed in range(4) for number in range(4)]
    for order in orders:
        assert sorted(order) == list(range(ROWS))
    # Also catches a key such as seed + epoch, where (0, 1) and (1, 0) would share an order.
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("shard_rows", [(1,), (5,), (1,) * 40, (1, 300, 2)])
def test_data_sets_of_any_shape(shard_rows: tuple[int, ...]) -> None:
    order = Order(shard_rows, 3, 8)
    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(sum(shard_rows)))


def test_any_slice_is_part_of_one_endless_order() -> None:
    expected = Order(SHARDS, 7, 3).indices(0, 4 * ROWS)
    order = Order(SHARDS, 7, 3)
    for first in np.random.default_rng(0).integers(0, 3 * ROWS, 50):  # out of sequence: every access is a random one
        np.testing.assert_array_equal(order.indices(int(first), 90), expected[first : first + 90])
    assert order.indices(5, 0).shape == (0,)


def test_sources_with_the_same_shards_have_different_orders() -> None:
    assert epoch(Order(SHARDS, 1, 3, series=1), 0) != epoch(Order(SHARDS, 1, 3, series=2), 0)


def test_every_needed_shard_was_announced() -> None:
    """``shards_from`` gives the shards in use first, then one for each slot."""
    order = Order(SHARDS, 5, 3)
    for sample in range(0, 2 * ROWS, 5):
        slot, last = order.slot_of(sample), sample
        while order.slot_of(last + 1) == slot:
            last += 1
        announced = order.shards_from(sample)
        in_use = {next(announced) for _ in range(order.in_use)}
        assert {int(SHARD_OF_ROW[row]) for row in order.indices(sample, last - sample + 1)} <= in_use
        if order.slot_of(last + 1)[0] == slot[0]:  # within the epoch, the next slot adds one shard
            in_use.add(next(announced))
            following = order.indices(last + 1, 1)
            assert int(SHARD_OF_ROW[following[0]]) in in_use


def test_the_order_is_the_one_that_earlier_versions_gave() -> None:
    """A run resumed after an upgrade must not read rows twice."""
    assert Order(SHARDS, 0, 3).indices(0, 8).tolist() == [98, 58, 49, 94, 55, 41, 2, 14]
    assert Order(SHARDS, 5, 3, series=9).indices(2 * ROWS + 50, 8).tolist() == [12, 67, 30, 61, 1, 87, 10, 6]


def test_rows_are_mixed_as_well_as_the_docstring_says() -> None:
    shards, rows, in_use = 64, 200, 16
    order = Order([rows] * shards, 11, in_use)
    read = order.indices(0, order.rows)
    shard = read // rows
    # Neighbours from one shard: binomial with probability 1 / G.
    together = np.mean(shard[1:] == shard[:-1])
    deviation = np.sqrt(1 / in_use * (1 - 1 / in_use) / len(shard))
    assert abs(together - 1 / in_use) < 5 * deviation
    # Any batch of 256 holds all shards in use, none of them much more than its share.
    for start in range(0, len(shard) - 256, 256):
        counts = Counter(shard[start : start + 256].tolist())
        assert in_use - 1 <= len(counts) <= in_use + 3
        assert max(counts.values()) <= 36  # 16 expected, 5 deviations
    # The place within the shard says nothing about when a row is read, nor does, over some epochs, the shard's own.
    place = np.arange(order.rows)
    assert abs(np.corrcoef(place, read % rows)[0, 1]) < 5 / np.sqrt(order.rows)
    epochs = [order.indices(number * order.rows, order.rows) for number in range(16)]
    assert abs(np.mean([np.corrcoef(place, rows_read)[0, 1] for rows_read in epochs])) < 5 / np.sqrt(16 * shards)
    # Rows that were neighbours, parts of one document perhaps, end up far apart.
    where = np.argsort(read)
    distances = np.abs(np.diff(where.reshape(shards, rows), axis=1))
    distances = np.minimum(distances, len(read) - distances)
    assert np.median(distances) > in_use * rows / 5


def test_a_corpus_of_100_billion_tokens_needs_no_stored_order() -> None:
    tracemalloc.start()
    order = Order([8187] * 6200, 1, 32)
    assert order.rows > 50e6
    rows = [order.indices(sample, 1)[0] for sample in (0, order.rows - 1, 7 * order.rows + 12_345_678)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows)) == 3
    assert peak_bytes < 0.02 * 8 * order.rows
