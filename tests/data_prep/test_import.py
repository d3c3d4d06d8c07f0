"""Importing token ids that were made elsewhere."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.tokenizer_file import load_tokenizer
from mythos.data.dataset import TokenDataset
from mythos.data.format import BOS, SPLITS, Manifest
from mythos.data.text_bytes import text_bytes_of_ids
from mythos.errors import UserError
from tests.data_prep.conftest import SEQUENCE_LENGTH, content_of, run

IMPORT = {"column": "input_ids", "content": "token_ids", "validation_percent": 20.0}
TYPES = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16()), pa.list_(pa.int16())]


def write_ids(
    path: Path, documents: list[list[int | None] | None], kind: pa.DataType = TYPES[0], rows: int = 5
) -> Path:
    parquet.write_table(pa.table({"input_ids": pa.array(documents, kind)}), path, row_group_size=rows)
    return path


@pytest.fixture
def ids(speeches: list[str], tokenizer: Path) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(tokenizer))
    return [encoder.encode(text).ids for text in speeches for _ in range(2)]


def rows_of(directory: Path, split: str) -> np.ndarray:
    dataset = TokenDataset(directory, split)
    return np.stack([dataset[number] for number in range(len(dataset))])


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_documents_are_complete_and_begin_with_bos(
    ids: list[list[int]], speeches: list[str], tokenizer: Path, tmp_path: Path, kind: pa.DataType
):
    # Every other document begins with BOS already; nulls and empty lists are not documents.
    given = [[0, *document] if number % 2 else document for number, document in enumerate(ids)]
    source = write_ids(tmp_path / "ids.parquet", [None, *given, [], None], kind)
    manifest, _ = run([source], tokenizer, tmp_path / "data", **IMPORT)
    found = []
    for split in SPLITS:
        tokens = rows_of(tmp_path / "data", split).reshape(-1)
        starts = np.flatnonzero(tokens == 0)
        assert starts[0] == 0
        found += [piece[1:].tolist() for piece in np.split(tokens, starts[1:])][:-1]
    assert len(found) == len(ids) - 2  # the last one of each split is cut
    assert all(document in ids for document in found)
    counts = manifest.splits.values()
    assert sum(split.documents for split in counts) == len(ids)
    assert sum(split.text_bytes or 0 for split in counts) == 2 * sum(len(text.encode()) for text in speeches)
    # The two copies of a document differ only in BOS, so they are in the same split.
    assert all(split.documents % 2 == 0 for split in counts)


def test_the_result_does_not_depend_on_integer_type_or_processes(ids: list[list[int]], tokenizer: Path, tmp_path: Path):
    contents = []
    for number, (kind, processes) in enumerate([(TYPES[1], 1), (TYPES[2], 1), (TYPES[1], 2)]):
        (tmp_path / str(number)).mkdir()
        source = write_ids(tmp_path / str(number) / "ids.parquet", list(ids), kind)
        run([source], tokenizer, tmp_path / str(number) / "data", processes=processes, packing="best_fit", **IMPORT)
        content = content_of(tmp_path / str(number) / "data")
        contents.append({name: data for name, data in content.items() if name != "manifest.json"})
    assert contents[0] == contents[1] == contents[2]


def test_lists_of_one_size(tokenizer: Path, tmp_path: Path):
    blocks = np.random.default_rng(0).integers(1, 512, size=(60, 40))
    array = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1), pa.int32()), 40)
    parquet.write_table(pa.table({"input_ids": array}), tmp_path / "blocks.parquet")
    manifest, _ = run([tmp_path / "blocks.parquet"], tokenizer, tmp_path / "data", **IMPORT)
    assert sum(split.tokens + split.tokens_dropped for split in manifest.splits.values()) == 60 * 41


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("bad", "found"), [(512, "token id 512"), (-1, "token id -1"), (None, "a null among the ids")])
def test_an_id_outside_the_vocabulary_is_reported_with_its_row(
    ids: list[list[int]], tokenizer: Path, tmp_path: Path, bad: int | None, found: str, processes: int
):
    documents: list[list[int | None] | None] = [None, [], *ids]
    documents[17] = [*ids[15][:9], bad, *ids[15][9:]]
    source = write_ids(tmp_path / "ids.parquet", documents)
    with pytest.raises(UserError, match=rf"{source}: row 17: {found}, but the tokenizer has ids 0 to 511") as caught:
        run([source], tokenizer, tmp_path / "data", processes=processes, **IMPORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.float32()), pa.int64()])
def test_a_column_without_ids_is_refused(tokenizer: Path, tmp_path: Path, kind: pa.DataType):
    parquet.write_table(pa.table({"input_ids": pa.nulls(3, kind)}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet: column 'input_ids' holds .*, not lists of integers"):
        run([tmp_path / "other.parquet"], tokenizer, tmp_path / "data", **IMPORT)


def test_text_bytes_of_ids_are_those_of_the_decoded_text(tokenizer: Path):
    loaded = load_tokenizer(tokenizer)
    sizes = text_bytes_of_ids(loaded.encoder)
    assert sizes is not None
    text = "caf\u00e9 \u4e2d\u6587 \U0001f600 and  spaces\n\n"
    assert sizes[loaded.encoder.encode(text).ids].sum() == len(text.encode())
    assert sizes[loaded.bos] == 0


def test_text_of_other_tokenizers_is_not_counted(tmp_path: Path):
    words = Tokenizer(models.WordLevel({BOS: 0, "[UNK]": 1} | {f"w{n}": n for n in range(2, 50)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    assert BOS in json.loads((tmp_path / "words.json").read_text(encoding="utf-8"))["model"]["vocab"]
    documents = np.random.default_rng(0).integers(1, 50, size=(60, 30)).tolist()
    source = write_ids(tmp_path / "ids.parquet", documents)
    run([source], tmp_path / "words.json", tmp_path / "data", **IMPORT)
    manifest = Manifest.load(tmp_path / "data")
    assert manifest.splits["train"].text_bytes is None
    assert manifest.splits["train"].bytes_per_token is None
    assert manifest.sequence_length == SEQUENCE_LENGTH
