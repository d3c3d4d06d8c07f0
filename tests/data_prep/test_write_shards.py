import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_prep.write_shards import prepare
from tokenizers import Tokenizer

from data_prep.documents import split_of
from mythos.data.format import BOS, SPLITS, Manifest, fingerprint
from mythos.data.stream import TokenDataset
from mythos.errors import UserError
from tests.data_prep.conftest import VALIDATION_PERCENT, write_parquet
from tests.data_prep.test_documents import damage_row_group

SEQUENCE_LENGTH = 64


def run(source: Path, tokenizer: Path, output: Path, **changes: Any) -> tuple[Manifest, bool]:
    arguments: dict[str, Any] = {
        "sources": [source],
        "column": "text",
        "tokenizer": tokenizer,
        "output": output,
        "sequence_length": SEQUENCE_LENGTH,
        "validation_percent": VALIDATION_PERCENT,
    }
    return prepare(**(arguments | changes))


def all_rows(directory: Path, split: str) -> np.ndarray:
    dataset = TokenDataset(directory, split)
    return np.stack([dataset[index] for index in range(len(dataset))])


@pytest.fixture(scope="module")
def prepared(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    run(source, tokenizer, output)
    return output


@pytest.mark.parametrize("split", SPLITS)
def test_rows_laid_end_to_end_are_the_documents_of_the_split(prepared: Path, speeches: list[str], split: str):
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    tokens = all_rows(prepared, split).reshape(-1)
    starts = np.flatnonzero(tokens == tokenizer.token_to_id(BOS))
    assert starts[0] == 0
    texts = [tokenizer.decode(piece[1:].tolist()) for piece in np.split(tokens, starts[1:])]
    expected = [text for text in speeches if split_of(text, VALIDATION_PERCENT) == split]
    assert texts[:-1] == expected[:-1]
    assert len(texts) == len(expected)
    assert expected[-1].startswith(texts[-1])  # less the dropped tail
    missing = len(tokenizer.encode(expected[-1]).ids) - (len(tokens) - starts[-1] - 1)
    assert missing == Manifest.load(prepared).splits[split].tokens_dropped < SEQUENCE_LENGTH + 1


def test_no_validation_row_occurs_among_the_train_rows(prepared: Path):
    train, validation = ({row.tobytes() for row in all_rows(prepared, split)} for split in SPLITS)
    assert len(validation) > 50
    assert not train & validation


def test_a_text_given_many_times_lies_in_one_split(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "twice.parquet", [*speeches, *reversed(speeches)])
    manifest, _ = run(source, tokenizer, tmp_path / "data")
    assert {split: counts.documents for split, counts in manifest.splits.items()} == {"train": 24, "validation": 4}


def test_manifest_says_what_there_is(prepared: Path, source: Path, speeches: list[str]):
    manifest = Manifest.load(prepared)
    assert manifest.vocabulary_size == 512
    assert manifest.sources[0].name == "speeches.parquet"
    assert manifest.sources[0].bytes == source.stat().st_size
    assert sum(counts.text_bytes for counts in manifest.splits.values()) == sum(len(t.encode()) for t in speeches)
    for split in SPLITS:
        counts = manifest.splits[split]
        assert counts.sequences == len(TokenDataset(prepared, split))
        assert counts.tokens == counts.sequences * (SEQUENCE_LENGTH + 1)
        assert 1.5 < counts.bytes_per_token < 4


def test_letters_of_the_special_token_inside_a_document_are_text(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "tricky.parquet", [*speeches, f"it says {BOS} here. " * 50])
    manifest, _ = run(source, tokenizer, tmp_path / "data")
    starts = sum(int((all_rows(tmp_path / "data", split) == 0).sum()) for split in SPLITS)
    assert starts == sum(counts.documents for counts in manifest.splits.values()) == 15


def test_several_shards_hold_the_same_rows(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "long.parquet", speeches * 12)
    run(source, tokenizer, tmp_path / "small", shard_size_mib=1)
    run(source, tokenizer, tmp_path / "large", shard_size_mib=32)
    assert len(list((tmp_path / "small" / "train").glob("*.mds"))) > 1
    assert len(list((tmp_path / "large" / "train").glob("*.mds"))) == 1
    for split in SPLITS:
        np.testing.assert_array_equal(all_rows(tmp_path / "small", split), all_rows(tmp_path / "large", split))


# --- run again --------------------------------------------------------------------------------------------------------


def content_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def test_the_second_run_does_nothing(source: Path, tokenizer: Path, tmp_path: Path):
    first, is_new = run(source, tokenizer, tmp_path / "data")
    assert is_new
    before = content_of(tmp_path)
    second, is_new = run(source, tokenizer, tmp_path / "data")
    assert not is_new
    assert second == first
    assert content_of(tmp_path) == before


def test_the_same_input_gives_the_same_data_in_another_place(source: Path, tokenizer: Path, prepared: Path, tmp_path):
    run(source, tokenizer, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(prepared)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequence_length": 32}, "sequence_length 64, not 32"),
        ({"validation_percent": 6.0}, "validation_percent=5.0"),
        ({"shard_size_mib": 1}, "shard_size_mib=32"),
    ],
)
def test_other_settings_are_refused(
    source: Path, tokenizer: Path, prepared: Path, changes: dict[str, Any], complaint: str
):
    before = content_of(prepared)
    with pytest.raises(UserError, match=complaint) as caught:
        run(source, tokenizer, prepared, **changes)
    assert str(prepared) in str(caught.value)
    assert content_of(prepared) == before


def test_other_sources_or_tokenizer_are_refused(source: Path, tokenizer: Path, prepared: Path, tmp_path: Path):
    other_source = tmp_path / source.name
    other_source.write_bytes(source.read_bytes() + b"PAR1")
    write_parquet(other_source, ["same name, other text"])
    with pytest.raises(UserError, match="made from other sources"):
        run(other_source, tokenizer, prepared)
    other_tokenizer = tmp_path / "tokenizer.json"
    other_tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match="tokenizer_sha256"):
        run(source, other_tokenizer, prepared)


def test_a_damaged_data_set_does_not_pass_for_a_finished_one(source: Path, tokenizer: Path, tmp_path: Path):
    run(source, tokenizer, tmp_path / "data")
    shard = tmp_path / "data" / "validation" / "shard.00000.mds"
    shard.unlink()
    with pytest.raises(UserError, match=str(shard)):
        run(source, tokenizer, tmp_path / "data")


def test_a_directory_of_something_else_is_left_alone(source: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"manifest\.json"):
        run(source, tokenizer, tmp_path / "notes")
    assert os.listdir(tmp_path / "notes") == ["thesis.txt"]


# --- failure ----------------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_nothing_and_the_next_succeeds(source: Path, tokenizer: Path, tmp_path: Path):
    workplace = tmp_path / "work"
    workplace.mkdir()
    damaged = damage_row_group(source, tmp_path / "damaged.parquet", row_group=1)
    with pytest.raises(UserError, match=r"damaged\.parquet: row group 1"):
        run(damaged, tokenizer, workplace / "data")
    assert os.listdir(workplace) == []
    _, is_new = run(source, tokenizer, workplace / "data")
    assert is_new
    assert os.listdir(workplace) == ["data"]


def test_a_killed_run_leaves_no_data_set_and_the_next_cleans_up(source: Path, tokenizer: Path, tmp_path: Path):
    output = tmp_path / "data"
    code = (
        "import os, sys; from pathlib import Path; from data_prep import write_shards; "
        "write_shards._flush_to_disk = lambda directory: os.kill(os.getpid(), 9); "  # all is written, but the rename
        f"write_shards.prepare([Path(sys.argv[1])], 'text', Path(sys.argv[2]), Path(sys.argv[3]), {SEQUENCE_LENGTH}, "
        f"{VALIDATION_PERCENT})"
    )
    process = subprocess.run([sys.executable, "-c", code, source, tokenizer, output], check=False)
    assert process.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".data.partial.")
    living = tmp_path / f".data.partial.{socket.gethostname()}.{os.getppid()}"
    other_machine = tmp_path / ".data.partial.elsewhere.1"
    living.mkdir()
    other_machine.mkdir()
    run(source, tokenizer, output)
    assert sorted(os.listdir(tmp_path)) == sorted(["data", living.name, other_machine.name])


def test_a_data_set_that_appeared_meanwhile_is_kept(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def other_process_is_faster(directory: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "theirs").touch()

    monkeypatch.setattr("data_prep.write_shards._flush_to_disk", other_process_is_faster)
    with pytest.raises(UserError, match="cannot be written"):
        run(source, tokenizer, tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]
    assert os.listdir(tmp_path / "data") == ["theirs"]


@pytest.mark.parametrize(("split", "percent"), [("validation", 1e-9), ("train", 100 - 1e-9)])
def test_a_split_without_a_row_is_refused(source: Path, tokenizer: Path, tmp_path: Path, split: str, percent: float):
    with pytest.raises(UserError, match=f"{split} split: 0 documents give 0 tokens") as caught:
        run(source, tokenizer, tmp_path / "data", validation_percent=percent)
    assert "--validation-percent" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequence_length": 0}, "sequence-length 0"),
        ({"shard_size_mib": 4096}, "shard-size-mib 4096"),
        ({"validation_percent": 0.0}, "validation-percent 0"),
        ({"column": "body"}, "no column 'body'; it has id, text"),
    ],
)
def test_unusable_settings(source: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        run(source, tokenizer, tmp_path / "data", **changes)
    assert os.listdir(tmp_path) == []


def test_tokenizer_file_that_is_none(source: Path, tokenizer: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        run(source, tmp_path / "nowhere.json", tmp_path / "data")
    broken = tmp_path / "broken.json"
    broken.write_text(tokenizer.read_text()[:500])
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer file"):
        run(source, broken, tmp_path / "data")
    content = json.loads(tokenizer.read_text().replace(BOS, "<|start|>"))
    broken.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"broken\.json: has no token <\|bos\|>"):
        run(source, broken, tmp_path / "data")
