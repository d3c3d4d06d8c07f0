import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import documents, prepare
from data_prep.documents import split_of
from mythos.data.dataset import TokenDataset
from mythos.data.format import BOS, SPLITS, Manifest, fingerprint
from mythos.errors import UserError
from tests.data_prep.conftest import SEQUENCE_LENGTH, VALIDATION_PERCENT, content_of, run, write_parquet
from tests.data_prep.test_documents import damage_row_group


def all_rows(directory: Path, split: str) -> np.ndarray:
    dataset = TokenDataset(directory, split)
    return np.stack([dataset[index] for index in range(len(dataset))])


@pytest.fixture(scope="module")
def prepared(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be changed."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    run([source], tokenizer, output)
    return output


@pytest.mark.parametrize("split", SPLITS)
def test_rows_joined_end_to_end_are_the_documents_of_the_split(prepared: Path, speeches: list[str], split: str):
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    tokens = all_rows(prepared, split).reshape(-1)
    starts = np.flatnonzero(tokens == tokenizer.token_to_id(BOS))
    assert starts[0] == 0
    texts = [tokenizer.decode(piece[1:].tolist()) for piece in np.split(tokens, starts[1:])]
    expected = [text for text in speeches if split_of(text, VALIDATION_PERCENT) == split]
    assert texts[:-1] == expected[:-1]
    assert len(texts) == len(expected)
    assert expected[-1].startswith(texts[-1])  # without the dropped tail
    missing = len(tokenizer.encode(expected[-1]).ids) - (len(tokens) - starts[-1] - 1)
    assert missing == Manifest.load(prepared).splits[split].tokens_dropped < SEQUENCE_LENGTH + 1


def test_no_validation_row_occurs_among_the_train_rows(prepared: Path):
    train, validation = ({row.tobytes() for row in all_rows(prepared, split)} for split in SPLITS)
    assert len(validation) > 50
    assert not train & validation


def test_a_repeated_text_is_in_one_split(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "twice.parquet", [*speeches, *reversed(speeches)])
    manifest, _ = run([source], tokenizer, tmp_path / "data")
    assert {split: counts.documents for split, counts in manifest.splits.items()} == {"train": 24, "validation": 4}


def test_manifest_describes_the_data(prepared: Path, source: Path, speeches: list[str]):
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


def test_a_special_token_spelled_in_a_document_is_text(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "tricky.parquet", [*speeches, f"it says {BOS} here. " * 50])
    manifest, _ = run([source], tokenizer, tmp_path / "data")
    starts = sum(int((all_rows(tmp_path / "data", split) == 0).sum()) for split in SPLITS)
    assert starts == sum(counts.documents for counts in manifest.splits.values()) == 15


def test_several_shards_hold_the_same_rows(speeches: list[str], tokenizer: Path, tmp_path: Path):
    source = write_parquet(tmp_path / "long.parquet", speeches * 12)
    run([source], tokenizer, tmp_path / "small", shard_size_mib=1)
    run([source], tokenizer, tmp_path / "large", shard_size_mib=32)
    assert len(list((tmp_path / "small" / "train").glob("*.mds"))) > 1
    assert len(list((tmp_path / "large" / "train").glob("*.mds"))) == 1
    for split in SPLITS:
        np.testing.assert_array_equal(all_rows(tmp_path / "small", split), all_rows(tmp_path / "large", split))


# --- run again --------------------------------------------------------------------------------------------------------


def state_of(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_the_second_run_does_nothing(source: Path, tokenizer: Path, tmp_path: Path):
    first, is_new = run([source], tokenizer, tmp_path / "data")
    assert is_new
    before = state_of(tmp_path)
    second, is_new = run([source], tokenizer, tmp_path / "data")
    assert not is_new
    assert second == first
    assert state_of(tmp_path) == before


def test_leftovers_of_a_run_that_was_killed_at_the_very_end_are_removed(source: Path, tokenizer: Path, tmp_path: Path):
    run([source], tokenizer, tmp_path / "data")
    (tmp_path / ".data.partial/parts").mkdir(parents=True)
    (tmp_path / ".data.partial/lock").touch()
    run([source], tokenizer, tmp_path / "data")
    assert os.listdir(tmp_path) == ["data"]


def test_the_same_input_gives_the_same_data_anywhere(source: Path, tokenizer: Path, prepared: Path, tmp_path):
    run([source], tokenizer, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(prepared)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequence_length": 32}, "sequence_length 64, not 32"),
        ({"validation_percent": 6.0}, "validation_percent=5.0"),
        ({"shard_size_mib": 1}, "shard_size_mib=32"),
        ({"packing": "best_fit"}, "packing='straight'"),
    ],
)
def test_other_settings_are_refused(
    source: Path, tokenizer: Path, prepared: Path, changes: dict[str, Any], complaint: str
):
    before = state_of(prepared)
    with pytest.raises(UserError, match=complaint) as caught:
        run([source], tokenizer, prepared, **changes)
    assert str(prepared) in str(caught.value)
    assert state_of(prepared) == before


def test_other_sources_or_tokenizer_are_refused(source: Path, tokenizer: Path, prepared: Path, tmp_path: Path):
    other_source = tmp_path / source.name
    other_source.write_bytes(source.read_bytes() + b"PAR1")
    write_parquet(other_source, ["same name, other text"])
    with pytest.raises(UserError, match="made from other sources"):
        run([other_source], tokenizer, prepared)
    other_tokenizer = tmp_path / "tokenizer.json"
    other_tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer_sha256"):
        run([source], other_tokenizer, prepared)


def test_a_damaged_data_set_is_not_taken_for_a_complete_one(source: Path, tokenizer: Path, tmp_path: Path):
    run([source], tokenizer, tmp_path / "data")
    shard = tmp_path / "data" / "validation" / "shard.00000.mds"
    shard.unlink()
    with pytest.raises(UserError, match=str(shard)):
        run([source], tokenizer, tmp_path / "data")


def test_a_foreign_directory_is_kept(source: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="exists and holds no data set"):
        run([source], tokenizer, tmp_path / "notes")
    assert os.listdir(tmp_path / "notes") == ["thesis.txt"]


# --- failure ----------------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_nothing_and_the_next_succeeds(source: Path, tokenizer: Path, tmp_path: Path):
    workplace = tmp_path / "work"
    workplace.mkdir()
    damaged = damage_row_group(source, tmp_path / "damaged.parquet", row_group=1)
    with pytest.raises(UserError, match=r"damaged\.parquet: row group 1"):
        run([damaged], tokenizer, workplace / "data")
    assert os.listdir(workplace) == []
    _, is_new = run([source], tokenizer, workplace / "data")
    assert is_new
    assert os.listdir(workplace) == ["data"]


def test_an_output_that_another_process_wrote_in_the_meantime_is_kept(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def other_process_is_faster(directory: Path, entries: list[dict[str, Any]]) -> None:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "theirs").touch()
        write_index(directory, entries)

    write_index = prepare.write_index
    monkeypatch.setattr("data_prep.prepare.write_index", other_process_is_faster)
    with pytest.raises(UserError, match="data.partial: Directory not empty"):
        run([source], tokenizer, tmp_path / "data")
    assert os.listdir(tmp_path / "data") == ["theirs"]


@pytest.mark.parametrize(("split", "percent"), [("validation", 1e-9), ("train", 100 - 1e-9)])
def test_a_split_without_a_row_is_refused(source: Path, tokenizer: Path, tmp_path: Path, split: str, percent: float):
    with pytest.raises(UserError, match=f"{split} split: 0 documents give 0 tokens") as caught:
        run([source], tokenizer, tmp_path / "data", validation_percent=percent)
    assert "--validation-percent" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"shard_size_mib": 4096}, "--shard-size-mib 4096"),
        ({"validation_percent": 0.0}, "--validation-percent 0"),
        ({"column": "body"}, "no column 'body'; it has id, text"),
    ],
)
def test_unusable_settings(source: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        run([source], tokenizer, tmp_path / "data", **changes)
    assert os.listdir(tmp_path) == []


def test_an_invalid_tokenizer_file(source: Path, tokenizer: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        run([source], tmp_path / "nowhere.json", tmp_path / "data")
    broken = tmp_path / "broken.json"
    broken.write_text(tokenizer.read_text(encoding="utf-8")[:500], encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer file"):
        run([source], broken, tmp_path / "data")
    content = json.loads(tokenizer.read_text(encoding="utf-8").replace(BOS, "<|start|>"))
    broken.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.json: has no token <\|bos\|>"):
        run([source], broken, tmp_path / "data")


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["straight", "best_fit"])
def test_every_document_occurs_once_for_any_parts(
    speeches: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
):
    """With many parts the tails are packed together: the tokens of at most one row may be missing."""
    texts = [f"{number} {text}" for number in range(3) for text in speeches]
    source = write_parquet(tmp_path / "texts.parquet", texts, row_group_documents=5)
    monkeypatch.setattr(documents, "RANGE_BYTES", 60_000)
    manifest, _ = run([source], tokenizer, tmp_path / "data", packing=packing)
    encoder = Tokenizer.from_file(str(tokenizer))
    for split in SPLITS:
        own = [encoder.encode(text).ids for text in texts if split_of(text, VALIDATION_PERCENT) == split]
        counts = manifest.splits[split]
        assert counts.documents == len(own)
        assert counts.tokens + counts.tokens_dropped == sum(len(ids) + 1 for ids in own)
        assert counts.tokens_dropped < SEQUENCE_LENGTH + 1
        rows = all_rows(tmp_path / "data", split)
        assert rows.size == counts.tokens
        expected = np.bincount([token for ids in own for token in ids] + [0] * len(own), minlength=512)
        missing = expected - np.bincount(rows.reshape(-1), minlength=512)
        assert (missing >= 0).all()
        assert missing.sum() == counts.tokens_dropped
        assert counts.documents_cut == counts.documents  # all are longer than a row of 65


def test_compressed_shards_hold_the_same_rows(source: Path, tokenizer: Path, prepared: Path, tmp_path: Path):
    run([source], tokenizer, tmp_path / "data", compression="zstd")
    plain, packed = (
        json.loads((path / "train/index.json").read_text(encoding="utf-8")) for path in (prepared, tmp_path / "data")
    )
    assert (tmp_path / "data/train/shard.00000.mds.zstd").is_file()
    assert packed["shards"][0]["zip_data"]["bytes"] < 0.8 * plain["shards"][0]["raw_data"]["bytes"]
    assert packed["shards"][0]["samples"] == plain["shards"][0]["samples"]


def test_a_part_made_with_other_settings_is_not_used(source: Path, tokenizer: Path, tmp_path: Path, prepared):
    with pytest.raises(UserError, match="validation split: 0 documents"):
        run([source], tokenizer, tmp_path / "data", validation_percent=1e-9)
    assert list((tmp_path / ".data.partial/parts").glob("*.json"))
    run([source], tokenizer, tmp_path / "data")
    assert content_of(tmp_path / "data") == content_of(prepared)


def test_finished_parts_are_not_made_again_unless_the_source_changed(
    several_sources: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    *good, last = several_sources
    damaged = damage_row_group(last, tmp_path / last.name, row_group=3)
    with pytest.raises(UserError, match=rf"{damaged}: row group 3 is damaged"):
        run([*good, damaged], tokenizer, tmp_path / "data")
    damaged.write_bytes(last.read_bytes())
    made: list[str] = []
    run_part = prepare.MakePart.run
    monkeypatch.setattr(
        prepare.MakePart, "run", lambda self, progress: (made.append(self.rows.source), run_part(self, progress))[1]
    )
    run([*good, damaged], tokenizer, tmp_path / "data")
    assert made == [str(damaged)]
    run(several_sources, tokenizer, tmp_path / "undisturbed")
    assert content_of(tmp_path / "data") == content_of(tmp_path / "undisturbed")
