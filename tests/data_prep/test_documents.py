from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_prep.documents import count_documents, read_documents, split_of
from mythos.errors import UserError
from tests.data_prep.conftest import write_parquet


def test_split_takes_about_the_share_asked_for_and_grows_with_it():
    texts = [f"document {number}" for number in range(4000)]
    at_5 = {text for text in texts if split_of(text, 5) == "validation"}
    at_20 = {text for text in texts if split_of(text, 20) == "validation"}
    assert 140 <= len(at_5) <= 260  # 200 expected, standard deviation 14
    assert at_5 < at_20


def test_split_rule_has_not_changed():
    """Another rule would move validation text into the train split of a later data set."""
    validation = [number for number in range(60) if split_of(f"document {number}", 10) == "validation"]
    assert validation == [3, 6, 7, 21, 27, 30, 39, 52]


@pytest.mark.parametrize("percent", [0, 100, -1, float("nan")])
def test_a_percentage_that_empties_a_split_is_refused(percent: float):
    with pytest.raises(UserError, match="validation-percent"):
        split_of("text", percent)


def test_documents_come_in_order_without_null_and_empty_ones(tmp_path: Path):
    first = write_parquet(tmp_path / "a.parquet", ["one", None, "", "two\n", "drei\u00df"], row_group_documents=2)
    second = write_parquet(tmp_path / "b.parquet", ["four"] * 200, row_group_documents=150)
    assert list(read_documents([second, first], "text")) == ["four"] * 200 + ["one", "two\n", "drei\u00df"]
    assert count_documents([first, second], "text") == 205


def test_row_groups_are_read_as_they_are_needed(source: Path, speeches: list[str], tmp_path: Path):
    damaged = damage_row_group(source, tmp_path / "damaged.parquet", row_group=2)
    documents = read_documents([damaged], "text")
    assert [next(documents) for _ in range(8)] == speeches[:8]
    with pytest.raises(UserError, match=r"damaged\.parquet: row group 2 is damaged") as caught:
        next(documents)
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
    with pytest.raises(UserError, match=r"latin\.parquet: row group 0 is damaged"):
        list(read_documents([path], "text"))


def test_unusable_sources_are_found_before_any_document_is_read(tmp_path: Path, source: Path):
    not_parquet = tmp_path / "notes.txt"
    not_parquet.write_text("plain text " * 100)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(source.read_bytes()[:-50])
    for path, complaint in [
        (tmp_path / "nowhere.parquet", "no such file"),
        (not_parquet, "not a readable Parquet file"),
        (cut, "not a readable Parquet file"),
        (tmp_path, "not a readable Parquet file"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            count_documents([source, path], "text")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_column_lists_the_columns_there_are(source: Path):
    with pytest.raises(UserError, match=r"speeches\.parquet: no column 'content'; it has id, text"):
        count_documents([source], "content")


def test_column_of_numbers(tmp_path: Path):
    path = tmp_path / "numbers.parquet"
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="'text' holds int64"):
        count_documents([path], "text")
