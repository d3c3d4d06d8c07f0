import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer

import data_prep.train_tokenizer as train_tokenizer_module
from data_prep import documents
from data_prep.documents import split_of
from data_prep.encoding import can_be_cut
from data_prep.prepare import settings_for
from data_prep.train_tokenizer import SampleSize, train_tokenizer
from launch.cli import main
from mythos.data.format import BOS
from mythos.errors import UserError
from tests.data_prep.conftest import VALIDATION_PERCENT, write_parquet
from tests.data_prep.test_documents import damage_row_group


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
    # Other documents give another tokenizer, so the equality above is not trivial.
    train_tokenizer([source], "text", 512, tmp_path / "fewer.json", validation_percent=50)
    assert (tmp_path / "fewer.json").read_bytes() != tokenizer.read_bytes()


def test_a_text_with_too_few_pairs_gives_a_smaller_vocabulary(tmp_path: Path):
    source = write_parquet(tmp_path / "short.parquet", ["aaaa bbbb"])
    size, _ = train_tokenizer([source], "text", 1000, tmp_path / "new" / "tokenizer.json", 1)
    assert 257 < size < 300


def test_source_without_text(tmp_path: Path):
    source = write_parquet(tmp_path / "empty.parquet", ["", None])
    with pytest.raises(UserError, match=r"empty\.parquet: no text for the train split"):
        train_tokenizer([source], "text", 300, tmp_path / "tokenizer.json", 1)
    assert not (tmp_path / "tokenizer.json").exists()


def test_vocabulary_below_the_bytes(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer([source], "text", 256, tmp_path / "tokenizer.json", 1)


def test_error_while_reading_reaches_the_caller(tmp_path: Path, source: Path):
    with pytest.raises(UserError, match="no column 'body'"):
        train_tokenizer([source], "body", 300, tmp_path / "tokenizer.json", 1)
    damaged = damage_row_group(source, tmp_path / "damaged.parquet", row_group=2)
    with pytest.raises(UserError, match=r"damaged\.parquet: row group 2"):  # raised inside the trainer's iterator
        train_tokenizer([damaged], "text", 300, tmp_path / "tokenizer.json", 1)


def test_special_tokens_follow_bos(source: Path, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer([source], "text", 300, path, 5, special_tokens=["<|user|>", "<|end|>"])
    trained = Tokenizer.from_file(str(path))
    assert [trained.token_to_id(token) for token in (BOS, "<|user|>", "<|end|>")] == [0, 1, 2]
    with pytest.raises(UserError, match="special-token"):
        train_tokenizer([source], "text", 300, path, 5, special_tokens=[BOS])
    with pytest.raises(UserError, match="at least 259"):
        train_tokenizer([source], "text", 258, path, 5, special_tokens=["<|user|>", "<|end|>"])


@pytest.mark.parametrize(("name", "value"), [("validation_percent", 0), ("sample_size", SampleSize(0))])
def test_unusable_settings(source: Path, tmp_path: Path, name: str, value: float):
    arguments = {"validation_percent": 5.0} | {name: value}
    with pytest.raises(UserError, match="validation-percent|sample-mb"):
        train_tokenizer([source], "text", 300, tmp_path / "tokenizer.json", **arguments)


def test_a_sample_comes_from_the_whole_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each row range has its own letter; a sample of a quarter must still contain most letters."""
    monkeypatch.setattr(documents, "RANGE_BYTES", 4000)
    monkeypatch.setattr(train_tokenizer_module, "_LEAST_VISIT_BYTES", 500)
    letters = [chr(ord("a") + number) for number in range(20)]
    source = write_parquet(
        tmp_path / "letters.parquet",
        [f"{letter * 60} {number:05}" for letter in letters for number in range(60)],
        row_group_documents=60,
    )
    seen: list[list[str]] = []
    monkeypatch.setattr(
        train_tokenizer_module.Tokenizer, "train_from_iterator", lambda self, texts, trainer: seen.append(list(texts))
    )
    for number in range(2):
        _, note = train_tokenizer([source], "text", 300, tmp_path / f"{number}.json", 5, sample_size=SampleSize(20_000))
        assert 15_000 < note.text_bytes < 20_100
    assert seen[0] == seen[1]
    assert len({text[0] for text in seen[0]}) >= 15


def test_bytes_per_token_are_those_of_the_held_out_text(speeches: list[str], tokenizer: Path):
    held_out = [text for text in speeches if split_of(text, VALIDATION_PERCENT) == "validation"]
    encoder = Tokenizer.from_file(str(tokenizer))
    note = json.loads(tokenizer.with_name("tokenizer.training.json").read_text(encoding="utf-8"))
    assert note["held_out_bytes"] == sum(len(text.encode()) for text in held_out)
    assert note["held_out_tokens"] == sum(len(encoder.encode(text).ids) for text in held_out)
    assert note["tokenizer_sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()


def test_preparation_uses_the_percentage_of_the_tokenizer(tokenizer: Path, tmp_path: Path):
    def share(asked: float | None, path: Path = tokenizer) -> float:
        return settings_for(path, asked, column="text", shard_size_mib=1).validation_percent

    assert share(None) == VALIDATION_PERCENT
    assert share(2.0) == 2.0
    with pytest.raises(UserError, match=r"--validation-percent 6.0: .*tokenizer\.json was trained with 5.0 held out"):
        share(6.0)
    foreign = tmp_path / "foreign.json"
    foreign.write_bytes(tokenizer.read_bytes())
    assert (share(None, foreign), share(6.0, foreign)) == (1.0, 6.0)
    # A note about another tokenizer is ignored.
    foreign.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    tmp_path.joinpath("foreign.training.json").write_bytes(tokenizer.with_name("tokenizer.training.json").read_bytes())
    assert share(6.0, foreign) == 6.0


def test_repeated_text_that_is_stored_once_counts_each_time_in_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_tokenizer_module, "_FURTHER_BYTES", 0)
    source = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a text of some length"] * 20_000}), source)
    assert source.stat().st_size < 20_000
    _, note = train_tokenizer([source], "text", 300, tmp_path / "t.json", 1, sample_size=SampleSize(30_000))
    assert 30_000 <= note.text_bytes < 30_100


def test_a_small_sample_is_still_measured_on_held_out_text(source: Path, tmp_path: Path):
    """Both documents of the validation split come after the sample is full."""
    _, note = train_tokenizer(
        [source], "text", 300, tmp_path / "t.json", VALIDATION_PERCENT, sample_size=SampleSize(5_000)
    )
    assert note.text_bytes < 20_000
    assert note.bytes_per_token is not None


def test_an_output_that_cannot_be_written_is_reported_before_the_work(tmp_path: Path):
    with pytest.raises(UserError, match="Is a directory: free space or choose another --output"):
        train_tokenizer([tmp_path / "not read.parquet"], "text", 300, tmp_path, 1)
    with pytest.raises(UserError, match="/proc/nowhere/t.json: .*: free space or choose another --output"):
        train_tokenizer([tmp_path / "not read.parquet"], "text", 300, Path("/proc/nowhere/t.json"), 1)


@pytest.mark.parametrize(
    ("digits", "numbers"),
    [(None, [" 1234567", "89"]), (2, [" ", "12", "34", "56", "7", "89"]), (3, [" ", "123", "456", "7", "89"])],
)
def test_words_of_a_split_pattern(source: Path, tmp_path: Path, digits: int | None, numbers: list[str]):
    train_tokenizer([source], "text", 300, tmp_path / "t.json", 5, gpt4_digits=digits)
    trained = Tokenizer.from_file(str(tmp_path / "t.json"))
    words = trained.pre_tokenizer.pre_tokenize_str("I'LL see 1234567.89 (or caf\u00e9)!\n\nThe end")
    expected = ["I", "'LL", " see", *numbers[:-1], ".", numbers[-1], " (", "or", " caf\u00e9", ")!\n\n", "The", " end"]
    if digits is None:
        expected = ["I", "'", "LL", *expected[2:-3], ")!", "\n", "\n", "The", " end"]
    assert [trained.decoder.decode([word]) for word, _ in words] == expected
    assert can_be_cut(trained)


def test_a_sample_in_characters_of_the_beginnings_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [f"{letter}\u00e9" * 500 for letter in "abcdefgh"]
    source = write_parquet(tmp_path / "texts.parquet", list(texts))
    seen: list[list[str]] = []
    monkeypatch.setattr(
        train_tokenizer_module.Tokenizer, "train_from_iterator", lambda self, texts, trainer: seen.append(list(texts))
    )
    size = SampleSize(250, in_characters=True, document_characters=100)
    _, note = train_tokenizer([source], "text", 300, tmp_path / "t.json", 1, sample_size=size)
    assert [len(text) for text in seen[0]] == [100, 100, 100], "the third one reaches the limit"
    assert all(text in {whole[:100] for whole in texts} for text in seen[0])
    assert note.text_bytes == 450


def test_options_that_exclude_each_other(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = ["data", "tokenizer", str(source), "--output", str(tmp_path / "t.json")]
    assert main([*train, "--sample-characters", "10", "--sample-mb", "1"]) == 2
    assert "--sample-characters 10: leave out --sample-mb" in capsys.readouterr().err
    assert main([*train, "--digits", "3"]) == 2
    assert "--digits 3: has an effect only with --split-pattern gpt4" in capsys.readouterr().err
    assert main([*train, "--split-pattern", "gpt4", "--digits", "3", "--vocabulary-size", "300"]) == 0
    assert r"\\p{N}{1,3}" in (tmp_path / "t.json").read_text(encoding="utf-8")
