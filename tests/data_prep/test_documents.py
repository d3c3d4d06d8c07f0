import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_prep import documents, parquet_file
from data_prep.documents import RowRange, split_of
from data_prep.parquet_file import ParquetFile
from mythos.errors import UserError
from tests.data_prep.conftest import write_parquet


def test_the_validation_split_has_about_the_given_share_and_grows_with_it():
    texts = [f"document {number}" for number in range(4000)]
    at_5 = {text for text in texts if split_of(text, 5) == "validation"}
    at_20 = {text for text in texts if split_of(text, 20) == "validation"}
    assert 140 <= len(at_5) <= 260  # 200 expected, standard deviation 14
    assert at_5 < at_20


def test_split_rule_has_not_changed():
    """Another rule would put validation text into the train split of a later data set."""
    validation = [number for number in range(60) if split_of(f"document {number}", 10) == "validation"]
    assert validation == [3, 6, 7, 21, 27, 30, 39, 52]


@pytest.mark.parametrize("percent", [0, 100, -1, float("nan")])
def test_a_percentage_that_empties_a_split_is_refused(percent: float):
    with pytest.raises(UserError, match="validation-percent"):
        split_of("text", percent)


def row_ranges(path: Path, column: str = "text") -> list[RowRange]:
    return ParquetFile(path, column, "text").row_ranges()


def all_rows(path: Path) -> RowRange:
    (rows,) = row_ranges(path)
    return rows


def read_texts(rows: RowRange, column: str = "text") -> Iterator[str]:
    return ParquetFile(Path(rows.source), column, "text").texts(rows)


def test_documents_are_read_in_order_without_null_and_empty_ones(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "", "two\n", "drei\u00df"], row_group_documents=2)
    assert list(read_texts(all_rows(path))) == ["one", "two\n", "drei\u00df"]


@pytest.mark.parametrize("range_bytes", [100, 1000, 3000, 1 << 20])
def test_row_ranges_cover_a_file_with_any_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int):
    texts = [f"document {number} " + "x" * (number % 7 * 10) for number in range(500)]
    monkeypatch.setattr(documents, "RANGE_BYTES", range_bytes)
    for row_group_documents in (3, 70, 500):
        path = write_parquet(tmp_path / "a.parquet", texts, row_group_documents)
        ranges = row_ranges(path)
        assert [rows.first_row for rows in ranges[1:]] == [rows.first_row + rows.rows for rows in ranges[:-1]]
        assert [text for rows in ranges for text in read_texts(rows)] == texts
        if row_group_documents == 500:  # one row group, read in pieces
            assert all(rows.bytes <= range_bytes for rows in ranges)
        if range_bytes == 1 << 20:
            assert len(ranges) == 1


def test_row_groups_are_read_when_they_are_needed(source: Path, speeches: list[str], tmp_path: Path):
    damaged = damage_row_group(source, tmp_path / "damaged.parquet", row_group=2)
    texts = read_texts(all_rows(damaged))
    assert [next(texts) for _ in range(8)] == speeches[:8]
    with pytest.raises(UserError, match=r"damaged\.parquet: row group 2 is damaged") as caught:
        next(texts)
    assert "\n" not in str(caught.value)


def damage_row_group(source: Path, path: Path, row_group: int) -> Path:
    """A copy with bytes overwritten from the start of the row group's text column."""
    column = parquet.ParquetFile(source).metadata.row_group(row_group).column(1)
    content = bytearray(source.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    return path


def test_text_that_is_not_utf8(tmp_path: Path):
    path = write_parquet(tmp_path / "latin.parquet", ["caf\u00e9"])
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xe9!"))
    with pytest.raises(
        UserError, match=r"latin\.parquet: row 0: not valid UTF-8 \(.* at byte 3\); write the file again as UTF-8"
    ):
        list(read_texts(all_rows(path)))


def test_unusable_sources_are_found_by_their_metadata(tmp_path: Path, source: Path):
    not_parquet = tmp_path / "notes.txt"
    not_parquet.write_text("plain text " * 100, encoding="utf-8")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(source.read_bytes()[:-50])
    nothing = tmp_path / "nothing.parquet"
    nothing.touch()
    for path, complaint in [
        (nothing, "not a readable Parquet file"),
        (tmp_path / "nowhere.parquet", "no such file"),
        (not_parquet, "not a readable Parquet file"),
        (cut, "not a readable Parquet file"),
        (tmp_path, "not a readable Parquet file"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            row_ranges(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_column_lists_the_columns_there_are(source: Path):
    with pytest.raises(UserError, match=r"speeches\.parquet: no column 'content'; it has id, text"):
        row_ranges(source, "content")


def test_column_of_numbers(tmp_path: Path):
    path = tmp_path / "numbers.parquet"
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="'text' holds int64"):
        row_ranges(path)


def test_a_changed_byte_of_a_page_with_a_checksum_is_detected(tmp_path: Path):
    path = tmp_path / "sums.parquet"
    table = pa.table({"text": ["some letters " * 20]})
    parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"letters some", b"lettexs some", 1))
    with pytest.raises(UserError, match=r"sums\.parquet: row group 0 is damaged"):
        list(read_texts(all_rows(path)))


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path):
    """A file of one row group of 100 MB, read by a fresh process from its last rows."""
    texts = pa.array([f"{number:08} " * 170 for number in range(65_000)])
    path = tmp_path / "large.parquet"
    parquet.write_table(
        pa.table({"text": texts}), path, row_group_size=1 << 30, compression="none", use_dictionary=False
    )
    code = (
        "import resource, sys; from pathlib import Path; from data_prep.parquet_file import ParquetFile; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "file = ParquetFile(Path(sys.argv[1]), 'text', 'text'); ranges = file.row_ranges(); before = peak(); "
        "print(len(ranges), sum(1 for _ in file.texts(ranges[-1])), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, encoding="utf-8", check=True)
    ranges, documents_read, more_kib = map(int, done.stdout.split())
    assert (ranges, documents_read) == (6, 65_000 - 65_000 * 5 // 6)
    assert more_kib < 40 << 10


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_text_type(kind: pa.DataType, tmp_path: Path):
    texts = ["one", None, "two", "", "one"]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(texts).cast(kind)}), path)
    assert list(read_texts(all_rows(path))) == ["one", "two", "one"]


def test_the_size_of_a_column_with_a_dot_in_its_name(tmp_path: Path):
    path = tmp_path / "a.parquet"
    texts = ["x" * 1000 + str(number) for number in range(100)]
    parquet.write_table(pa.table({"content.text": texts, "content": texts[::-1]}), path, compression="none")
    (rows,) = row_ranges(path, "content.text")
    assert 100_000 < rows.bytes < 110_000
    assert list(read_texts(rows, "content.text")) == texts


def test_repeated_documents_that_are_stored_once_are_cut_into_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "RANGE_ROWS", 70)
    path = tmp_path / "a.parquet"
    for row_group_documents in (30, 500):
        parquet.write_table(pa.table({"text": ["the same"] * 500}), path, row_group_size=row_group_documents)
        ranges = row_ranges(path)
        assert max(rows.rows for rows in ranges) <= 70
        assert sum(len(list(read_texts(rows))) for rows in ranges) == 500


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: two columns are named 'text'"):
        row_ranges(path)


def test_long_documents_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"{number}" * 1000 for number in range(10, 40)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_documents=30)
    sizes = []
    monkeypatch.setattr(parquet_file, "_BATCH_BYTES", 6000)
    for _, batch in ParquetFile(path, "text", "text").batches(all_rows(path)):
        sizes.append(len(batch))
    assert (max(sizes), sum(sizes)) == (2, 30)
