from pathlib import Path

import numpy as np
import pytest

from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.errors import UserError
from tests.data.conftest import ROWS, SEQUENCE_LENGTH, write_data_set
from tests.data.test_dataset import flip_byte

LENGTH = ROWS["train"]
SHUFFLE = 3


@pytest.fixture(scope="module")
def directories(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    root = tmp_path_factory.mktemp("sources")
    return {
        "web": (pristine, 0.6),
        "code": (write_data_set(root / "code", seed=1, rows=41), 0.3),
        "books": (write_data_set(root / "books", seed=2, rows=23), 0.1),
    }


def open_stream(directories: dict[str, tuple[Path, float]], seed: int = 7) -> TokenStream:
    sources = [Source(name, weight, TokenDataset(path, "train")) for name, (path, weight) in directories.items()]
    return TokenStream(sources, seed, SHUFFLE)


def one(directory: Path, seed: int = 7) -> TokenStream:
    return open_stream({"data": (directory, 1.0)}, seed)


def samples(stream: TokenStream, first: int, count: int) -> list[tuple[int, int]]:
    return list(zip(*(values.tolist() for values in stream.samples(first, count)), strict=True))


@pytest.mark.parametrize("kind", ["one source", "mixture"])
def test_a_changing_number_of_ranks_reads_the_samples_of_one_rank(
    kind: str, directories: dict[str, tuple[Path, float]]
) -> None:
    """Each attempt opens the data again and knows only the sample number, as a resumed run does."""
    if kind == "one source":
        directories = {"data": directories["web"]}
    batch, micro_batch = 24, 3  # 24 does not divide the 103, 41 and 23 rows: batches span epochs
    attempts = [(4, 7), (2, 5), (1, 3), (4, 6), (8, 4)]  # ranks, steps
    total = batch * sum(steps for _, steps in attempts)
    one_rank = open_stream(directories)
    expected_rows, expected = one_rank.rows(0, total), samples(one_rank, 0, total)
    one_rank.close()

    step = 0
    for ranks, steps in attempts:
        streams = [open_stream(directories) for _ in range(ranks)]
        for _ in range(steps):
            for micro_step in range(batch // (ranks * micro_batch)):
                for rank, stream in enumerate(streams):
                    first = step * batch + (micro_step * ranks + rank) * micro_batch
                    np.testing.assert_array_equal(
                        stream.rows(first, micro_batch), expected_rows[first : first + micro_batch]
                    )
                    assert samples(stream, first, micro_batch) == expected[first : first + micro_batch]
            step += 1
        for stream in streams:
            stream.close()
    if kind == "one source":
        for epoch in range(total // LENGTH):
            assert sorted(row for _, row in expected[epoch * LENGTH : (epoch + 1) * LENGTH]) == list(range(LENGTH))


def test_rows_are_those_of_their_source(directories: dict[str, tuple[Path, float]]) -> None:
    stream = open_stream(directories)
    sets = [TokenDataset(directories[name][0], "train") for name in sorted(directories)]
    rows = stream.rows(500, 60)
    assert rows.shape == (60, SEQUENCE_LENGTH + 1)
    assert rows.dtype == np.int64
    for row, (source, index) in zip(rows, samples(stream, 500, 60), strict=True):
        np.testing.assert_array_equal(row, sets[source][index])
    assert stream.rows(40, 0).shape == (0, SEQUENCE_LENGTH + 1)


def test_every_source_has_its_own_epochs(directories: dict[str, tuple[Path, float]]) -> None:
    stream = open_stream(directories)
    count = 1000
    drawn = samples(stream, 0, count)
    for number, source in enumerate(stream.sources):
        own = [row for at, row in drawn if at == number]
        length = len(source.dataset)
        for epoch in range(len(own) // length):
            assert sorted(own[epoch * length : (epoch + 1) * length]) == list(range(length)), source.name
        assert len(own) == pytest.approx(source.weight * count, abs=2)
        assert stream.epochs(count)[source.name] == len(own) / length


def test_the_order_of_the_sources_in_the_configuration_does_not_matter(
    directories: dict[str, tuple[Path, float]],
) -> None:
    turned = dict(reversed(directories.items()))
    np.testing.assert_array_equal(open_stream(directories).rows(11, 90), open_stream(turned).rows(11, 90))


def test_the_seed_determines_the_order(pristine: Path) -> None:
    assert samples(one(pristine, 1), 0, 50) != samples(one(pristine, 2), 0, 50)


def test_the_samples_are_those_of_earlier_versions(directories: dict[str, tuple[Path, float]]) -> None:
    """A run that is resumed after an upgrade must not read rows twice."""
    assert samples(open_stream(directories), 300, 6) == [(2, 34), (1, 7), (2, 77), (1, 15), (2, 25), (2, 65)]


def test_a_damaged_shard_is_reported_when_its_rows_are_read_and_not_before(data_set: Path) -> None:
    stream = one(data_set)
    batches = [{int(row) for _, row in samples(stream, first, 4)} for first in range(0, LENGTH, 4)]
    ends = np.cumsum([shard.rows for shard in stream.sources[0].dataset.shards])
    first_use = [
        min(step for step, rows in enumerate(batches) if any(start <= row < end for row in rows))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    last = int(np.argmax(first_use))
    assert first_use[last] > 5, "the damage is found during the run"
    shard = data_set / "train" / f"shard.{last:05d}.mds"
    flip_byte(shard, -1)
    stream = one(data_set)
    for step in range(first_use[last]):
        stream.rows(4 * step, 4)
    with pytest.raises(UserError, match="damaged, its hash differs") as caught:
        stream.rows(4 * first_use[last], 4)
    assert str(shard) in str(caught.value)
    with pytest.raises(UserError, match="damaged"):
        stream.rows(4 * first_use[last], 4)
