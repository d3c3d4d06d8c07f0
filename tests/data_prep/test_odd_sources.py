"""Odd files among many: without rows, of nulls alone, text that is not marked as UTF-8, and folders of files."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_prep.train_tokenizer import train_tokenizer
from data_prep.verify import verify
from data_prep.workers import Workers
from mythos.data.format import SPLITS
from mythos.errors import UserError
from tests.data_prep.conftest import BARE, content_of, run, write_parquet


def write(path: Path, column: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"text": column}), path)
    return path


def shards(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in content_of(directory).items() if name.startswith(SPLITS)}


def test_a_folder_with_odd_files_gives_the_documents_of_the_others(
    speeches: list[str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    texts = [text.encode() for text in speeches]
    write(folder / "a.parquet", pa.array([], pa.string()))
    write(folder / "b" / "c.parquet", pa.array(texts[:5], pa.binary()))
    write(folder / "b" / "nulls.parquet", pa.nulls(7))
    write(folder / "d.parquet", pa.array([*speeches[5:9], None, ""], pa.large_string()))
    write(folder / "e.parquet", pa.array([None, None], pa.string()))
    write(folder / "f.parquet", pa.array(texts[9:], pa.large_binary()))
    (folder / "notes.txt").write_text("not a part", encoding="utf-8")
    parts = [speeches[:5], speeches[5:9], speeches[9:]]
    plain = [write_parquet(tmp_path / f"{number}.parquet", list(part)) for number, part in enumerate(parts)]
    run(plain, tokenizer, tmp_path / "expected")
    run([folder], tokenizer, tmp_path / "data", processes=2)
    assert shards(tmp_path / "data") == shards(tmp_path / "expected")
    odd = [folder / "a.parquet", folder / "b" / "nulls.parquet", folder / "e.parquet"]
    note = f"left out, no documents: {', '.join(map(str, odd))}"
    assert note in re.sub(r"\s*\n", " ", capsys.readouterr().err).replace("  ", " ")
    train_tokenizer([folder], "text", 512, tmp_path / "tokenizer.json", 5.0)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_bytes_that_are_not_utf8_are_named_with_file_and_row(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "latin.parquet", pa.array([b"fine", None, "caf\u00e9".encode("latin-1")], pa.binary()))
    with pytest.raises(UserError, match=r"latin\.parquet: row 2: not valid UTF-8 \(.* at byte 3\); write the file"):
        run([path], tokenizer, tmp_path / "data")


def test_a_folder_without_parquet_files_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: a directory without Parquet files \(\*\.parquet\); check the path"):
        run([tmp_path / "folder"], tokenizer, tmp_path / "data")


def test_only_odd_files_are_one_line(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "empty.parquet", pa.array([], pa.string()))
    with pytest.raises(UserError) as refused:
        run([path], tokenizer, tmp_path / "data")
    assert "\n" not in str(refused.value)


def test_a_bad_shard_whose_path_holds_a_colon_is_named_once(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = tmp_path / "at 10:30"
    run([source], tokenizer, data)
    shard = next((data / "train").glob("shard.*"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with Workers(BARE, 1) as workers:
        _, findings = verify(data, workers, lambda size: None)
    assert "\n".join(findings).count(f"{shard}:") == 1
