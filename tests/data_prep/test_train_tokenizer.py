import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_prep.documents import split_of
from data_prep.train_tokenizer import train_tokenizer
from mythos.data.format import BOS
from mythos.errors import UserError
from tests.data_prep.conftest import VALIDATION_PERCENT, write_parquet


def test_every_text_decodes_to_itself(tokenizer: Path):
    trained = Tokenizer.from_file(str(tokenizer))
    assert trained.get_vocab_size() == 512
    assert trained.token_to_id(BOS) == 0
    for text in ["We the People", "  two  spaces\n\n\ttab", "\u00e9\u4e2d\u6587 \U0001f600 \x00\x7f", "x"]:
        assert trained.decode(trained.encode(text).ids) == text


def test_same_file_in_another_process_with_one_thread(source: Path, tokenizer: Path, tmp_path: Path):
    again = tmp_path / "again.json"
    code = (
        "import sys; from pathlib import Path; from data_prep.train_tokenizer import train_tokenizer; "
        f"train_tokenizer([Path(sys.argv[1])], 'text', 512, Path(sys.argv[2]), {VALIDATION_PERCENT})"
    )
    environment = os.environ | {"PYTHONHASHSEED": "11", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(source), str(again)], check=True, env=environment)
    assert again.read_bytes() == tokenizer.read_bytes()


def test_validation_text_does_not_reach_the_tokenizer(speeches: list[str], tokenizer: Path, tmp_path: Path):
    train_only = [text for text in speeches if split_of(text, VALIDATION_PERCENT) == "train"]
    source = write_parquet(tmp_path / "train_only.parquet", list(train_only))
    train_tokenizer([source], "text", 512, tmp_path / "tokenizer.json", VALIDATION_PERCENT)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    # The same documents would have made a difference, so the equality above says something.
    train_tokenizer([source], "text", 512, tmp_path / "fewer.json", validation_percent=50)
    assert (tmp_path / "fewer.json").read_bytes() != tokenizer.read_bytes()


def test_vocabulary_that_the_text_cannot_fill_is_fine(tmp_path: Path):
    source = write_parquet(tmp_path / "short.parquet", ["aaaa bbbb"])
    size = train_tokenizer([source], "text", 1000, tmp_path / "new" / "tokenizer.json", 1)
    assert 257 < size < 300


@pytest.mark.parametrize("texts", [[], ["", None]])
def test_source_without_text(tmp_path: Path, texts: list[str | None]):
    source = tmp_path / "empty.parquet"
    write_parquet(source, texts or ["x"])
    if not texts:
        import pyarrow.parquet as parquet

        parquet.write_table(parquet.read_table(source).slice(0, 0), source)
    with pytest.raises(UserError, match=r"empty\.parquet: no text for the train split"):
        train_tokenizer([source], "text", 300, tmp_path / "tokenizer.json", 1)
    assert not (tmp_path / "tokenizer.json").exists()


def test_vocabulary_below_the_bytes(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer([source], "text", 256, tmp_path / "tokenizer.json", 1)


def test_error_while_reading_reaches_the_caller(tmp_path: Path, source: Path):
    with pytest.raises(UserError, match="no column 'body'"):
        train_tokenizer([source], "body", 300, tmp_path / "tokenizer.json", 1)
    with pytest.raises(UserError, match="validation-percent"):  # raised inside the trainer's iterator
        train_tokenizer([source], "text", 300, tmp_path / "tokenizer.json", 0)
