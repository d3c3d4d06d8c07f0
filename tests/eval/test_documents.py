"""Bits per byte of documents against a direct count over the raw text."""

import math
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.documents import split_of
from mythos.data.dataset import TokenDataset
from mythos.data.format import BOS
from mythos.data.open import read_tokenizer
from mythos.eval.documents import byte_counts, bytes_in_rows, read_documents
from mythos.eval.requests import score
from mythos.model import build_model, depth
from tests.eval.conftest import SEQUENCE_LENGTH, VALIDATION_PERCENT, text_config
from tests.model.helpers import randomise

CPU = torch.device("cpu")


def whole_documents(sentences: list[str], data: Path) -> list[str]:
    """The texts of the validation split, without those that were cut off at its end."""
    texts = [text for text in sentences if split_of(text, VALIDATION_PERCENT) == "validation"]
    tokenizer, left = Tokenizer.from_file(str(data / "tokenizer.json")), len(TokenDataset(data, "validation"))
    left *= SEQUENCE_LENGTH + 1
    found = []
    for text in texts:
        left -= 1 + len(tokenizer.encode(text).ids)
        if left >= 0:
            found.append(text)
    return found


def test_bits_per_byte_are_those_of_the_raw_text(sentences: list[str], text_data: Path) -> None:
    dataset, tokenizer = TokenDataset(text_data, "validation"), read_tokenizer(text_data / "tokenizer.json")
    bos = tokenizer.token_to_id(BOS)
    config = text_config(text_data, text_data, model__initial_state="zero")  # noise depends on the input's length
    net = randomise(build_model(config), deviation=0.1).eval()
    text = read_documents(dataset, tokenizer, bos, None, with_bos=True)
    texts = whole_documents(sentences, text_data)
    assert len(texts) > 3
    expected_bits, expected_bytes = 0.0, 0
    for number, raw in enumerate(texts):
        ids = [bos, *tokenizer.encode(raw).ids][: SEQUENCE_LENGTH + 1]
        assert text.requests[number].tokens.tolist() == ids
        row, seed = torch.tensor([ids]), text.requests[number].state_seed
        with torch.no_grad():
            logits = net(row[:, :-1], None, depth.fixed(2, 1, [seed]))[0]
        expected_bits += F.cross_entropy(logits, row[0, 1:], reduction="sum").item() / math.log(2)
        fits = len(ids) <= SEQUENCE_LENGTH
        expected_bytes += len((raw if fits else tokenizer.decode(ids[1:])).encode())
    assert sum(len([bos, *tokenizer.encode(raw).ids]) <= SEQUENCE_LENGTH for raw in texts) > 2
    del text.requests[len(texts) :], text.bytes_of[len(texts) :]
    with torch.no_grad():
        nats = text.nats(lambda requests: score(net, requests, 2, 256, SEQUENCE_LENGTH, CPU))
    found = text.metrics(nats)
    assert len(nats) == len(texts)
    assert math.isclose(nats.sum() / math.log(2), expected_bits, rel_tol=1e-6)
    assert math.isclose(found["bits_per_byte"], expected_bits / expected_bytes, rel_tol=1e-6)
    tokens = sum(len(request.tokens) - 1 for request in text.requests)
    assert math.isclose(found["loss"], expected_bits * math.log(2) / tokens, rel_tol=1e-6)


def test_without_bos_a_document_begins_with_its_text(text_data: Path) -> None:
    dataset, tokenizer = TokenDataset(text_data, "validation"), read_tokenizer(text_data / "tokenizer.json")
    bos = tokenizer.token_to_id(BOS)
    with_bos, without = (read_documents(dataset, tokenizer, bos, None, flag) for flag in (True, False))
    for one, other in zip(with_bos.requests, without.requests, strict=True):
        assert one.tokens[0] == bos
        assert other.tokens[:SEQUENCE_LENGTH].tolist() == one.tokens[1:].tolist()
        assert len(other.tokens) <= SEQUENCE_LENGTH + 1
    assert max(len(each.tokens) for each in without.requests) == SEQUENCE_LENGTH + 1


def test_a_smaller_set_of_documents_is_a_part_of_a_larger_one(text_data: Path) -> None:
    dataset, tokenizer = TokenDataset(text_data, "train"), read_tokenizer(text_data / "tokenizer.json")
    bos = tokenizer.token_to_id(BOS)

    def seeds(documents: int | None) -> list[int]:
        return [each.state_seed for each in read_documents(dataset, tokenizer, bos, documents, True).requests]

    few, more, every = seeds(5), seeds(20), seeds(None)
    assert (len(few), len(more)) == (5, 20)
    assert set(few) < set(more) < set(every)
    assert every == sorted(every)
    assert len(every) == sum((dataset[row] == bos).sum() for row in range(len(dataset)))


def test_bytes_in_rows_are_those_of_the_decoded_targets(text_data: Path) -> None:
    dataset, tokenizer = TokenDataset(text_data, "validation"), read_tokenizer(text_data / "tokenizer.json")
    rows = np.arange(len(dataset))
    targets = [int(token) for row in rows for token in dataset[row][1:]]
    bos = tokenizer.token_to_id(BOS)
    pieces = [tokenizer.decode(list(ids)) for is_bos, ids in groupby(targets, lambda token: token == bos) if not is_bos]
    assert bytes_in_rows(dataset, rows, tokenizer) == sum(len(piece.encode()) for piece in pieces)


def test_the_bytes_of_another_kind_of_tokenizer_are_unknown() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "w": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([BOS])
    sizes = byte_counts(words)
    assert sizes[words.token_to_id(BOS)] == 0
    assert math.isnan(sizes[1])
