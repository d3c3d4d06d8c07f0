import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import documents as document_rules
from data_prep.documents import split_of
from data_prep.packing import BestFitPacker, CropPacker, Piece, StraightPacker
from mythos.data.dataset import TokenDataset
from mythos.data.format import SPLITS, Manifest
from tests.data_prep.conftest import SEQUENCE_LENGTH, VALIDATION_PERCENT, content_of, run, write_parquet
from tests.reference.packing import SlowBestFit, SlowCrop


def documents(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents of distinct tokens, so that a row shows which documents it contains."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(1 + generator.exponential(longest / 4, size=count).astype(int), longest)
    starts = np.cumsum([0, *lengths[:-1]])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


def pack(packer, given: list[list[int]]) -> tuple[list[list[int]], list[Piece]]:
    rows = [row for document in given for row in packer.add(Piece(np.array(document, dtype=np.uint32)))]
    last_rows, left = packer.finish()
    return [row.tolist() for row in (*rows, *last_rows)], left


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("row_tokens", "longest", "buffer_tokens"), [(16, 60, 64), (16, 14, 200), (33, 30, 330), (5, 5, 1)]
)
def test_rows_follow_their_rules(seed: int, row_tokens: int, longest: int, buffer_tokens: int):
    given = documents(seed, 150, longest)
    slow = SlowBestFit(row_tokens, buffer_tokens)
    expected = [row for document in given for row in slow.add(document)] + slow.finish()
    fast = BestFitPacker(row_tokens, buffer_tokens)
    rows, left = pack(fast, given)
    assert rows == expected
    assert fast.documents_cut == slow.cut
    assert sorted(piece.tokens.tolist() for piece in left) == sorted(slow.remainders + slow.documents)

    slow_crop, crop = SlowCrop(row_tokens, buffer_tokens), CropPacker(row_tokens, buffer_tokens)
    expected = [row for document in given for row in slow_crop.add(document)] + slow_crop.finish()
    rows, left = pack(crop, given)
    assert rows == expected
    assert (crop.documents_cut, crop.tokens_dropped) == (slow_crop.cut, slow_crop.dropped)
    assert sorted(piece.tokens.tolist() for piece in left) == sorted(slow_crop.documents)


@pytest.mark.parametrize("packer", [StraightPacker(16), BestFitPacker(16, 100)])
def test_no_token_is_lost_and_cut_documents_are_counted(packer):
    given = documents(7, 300, 50)
    rows, left = pack(packer, given)
    assert all(len(row) == 16 for row in rows)
    kept = [token for row in rows for token in row] + [token for piece in left for token in piece.tokens.tolist()]
    assert sorted(kept) == list(range(sum(map(len, given))))
    assert sum(len(piece.tokens) for piece in left) < 16
    row_of = {token: number for number, row in enumerate(rows) for token in row}
    cut = sum(len({row_of.get(token) for token in document}) > 1 for document in given)
    assert packer.documents_cut == cut > 0


def test_a_text_continues_after_its_own_beginning_or_at_the_start_of_a_row():
    given = documents(3, 400, 40)
    rows, _ = pack(BestFitPacker(16, 200), given)
    beginnings = {document[0] for document in given}
    for row in rows:
        for before, token in pairwise(row):
            assert token in beginnings or token == before + 1


def test_straight_rows_are_the_documents_end_to_end():
    rows, (left,) = pack(StraightPacker(4), [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12, 13]])
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert left.tokens.tolist() == [12, 13]
    assert left.continues
    exact = StraightPacker(4)
    assert pack(exact, [[0, 1], [2, 3], [4]])[1] == [Piece(np.array([4]), continues=False)]
    assert exact.documents_cut == 0


def test_best_fit_cuts_fewer_documents():
    given = documents(11, 3000, 250)
    cut = {}
    for packer in (StraightPacker(257), BestFitPacker(257, 20_000)):
        pack(packer, given)
        cut[type(packer).__name__] = packer.documents_cut
    assert cut["BestFitPacker"] < cut["StraightPacker"] / 10


def test_a_cropped_row_consists_of_beginnings_of_documents():
    given = documents(5, 400, 60)
    packer = CropPacker(16, 200)
    rows, left = pack(packer, given)
    place = {token: (number, offset) for number, document in enumerate(given) for offset, token in enumerate(document)}
    seen, cut, dropped = set(), 0, 0
    for row in rows:
        assert place[row[0]][1] == 0
        for number, taken in zip(*np.unique([place[token][0] for token in row], return_counts=True), strict=True):
            assert [place[token][1] for token in row if place[token][0] == number] == list(range(taken))
            assert number not in seen
            seen.add(number)
            cut += taken < len(given[number])
            dropped += len(given[number]) - taken
    assert len(seen) + len(left) == len(given)
    assert (packer.documents_cut, packer.tokens_dropped) == (cut, dropped)
    assert dropped > 0


def test_a_data_set_of_cropped_rows_and_its_counts(
    speeches: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Many short documents in several parts, whose tails are packed together."""
    texts = [f"{n} {text[start : start + 90]}" for n, text in enumerate(speeches) for start in range(0, 9000, 70)]
    source = write_parquet(tmp_path / "texts.parquet", texts, row_group_documents=50)
    monkeypatch.setattr(document_rules, "RANGE_BYTES", 20_000)
    manifest, _ = run([source], tokenizer, tmp_path / "data", packing="crop")
    encoder, begin = Tokenizer.from_file(str(tokenizer)), manifest.special_ids
    assert begin == (0,)
    for split in SPLITS:
        counts, dataset = manifest.splits[split], TokenDataset(tmp_path / "data", split)
        rows = dataset.read(range(len(dataset)))
        own = [encoder.encode(text).ids for text in texts if split_of(text, VALIDATION_PERCENT) == split]
        assert (rows[:, 0] == 0).all()
        beginnings = {tuple(ids[:length]) for ids in own for length in range(len(ids) + 1)}
        found = [tuple(piece[1:]) for row in rows for piece in np.split(row, np.flatnonzero(row == 0))[1:]]
        assert beginnings.issuperset(found)
        cut = len(own) - len(found) + sum(piece not in set(map(tuple, own)) for piece in found)
        assert (counts.documents, counts.documents_cut) == (len(own), cut)
        assert cut > 0
        assert counts.tokens + counts.tokens_dropped == sum(len(ids) + 1 for ids in own)
        assert counts.positions == len(rows) * SEQUENCE_LENGTH
        assert counts.text_tokens == (rows[:, 1:] != 0).sum() < counts.positions


def test_data_that_an_earlier_version_prepared_is_known_again(source: Path, tokenizer: Path, tmp_path: Path):
    run([source], tokenizer, tmp_path / "data")
    path = tmp_path / "data/manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for holder in (manifest, *manifest["splits"].values()):
        for name in ("special_ids", "positions", "text_tokens"):
            holder.pop(name, None)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    before = content_of(tmp_path / "data")
    assert run([source], tokenizer, tmp_path / "data")[1] is False
    assert content_of(tmp_path / "data") == before
    assert Manifest.load(tmp_path / "data").splits["train"].text_tokens is None
