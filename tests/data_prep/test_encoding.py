"""Long documents are encoded in pieces, with the ids of the whole; and tokenizers from elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from data_prep import encoding
from data_prep.encoding import ENCODED_AS_A_WHOLE, GPT_4, LLAMA_3, QWEN_2, can_be_cut, cut_at_words, encode
from launch.cli import main
from mythos.data.dataset import TokenDataset
from mythos.data.format import BOS, Manifest
from mythos.data.open import read_tokenizer
from mythos.errors import UserError
from mythos.eval.generate import prompt_ids
from tests.data_prep.conftest import run, write_parquet

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LATER_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CORPUS = [
    "It's 2,000 years, isn't it?  we'll see: caf\u00e9 na\u00efve.\n\n  The end\r\n\tof 12345 things",
    "a b c  d   e",
]
TEXTS = st.text(
    st.sampled_from(list("ab'stlre 12 \n\r\t.,!-_ \u00e9\u0301\u00a0\u3000\u4e2d\u03a3\U0001f600")), max_size=60
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), LATER_BYTES])


def trained(splitter: pre_tokenizers.PreTokenizer, kind: str = "bpe", normalizer: str | None = None) -> Tokenizer:
    special = [BOS, "[UNK]"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, show_progress=False, initial_alphabet=BYTES.alphabet()
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = splitter
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


CUT = {
    "GPT-2": trained(BYTES),
    "GPT-2 with a first space": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": trained(split(LLAMA_3)),
    "GPT-4": trained(split(GPT_4[2])),
    "Qwen 2": trained(split(QWEN_2), normalizer="NFC"),
    "words": trained(pre_tokenizers.Whitespace(), normalizer="NFKC"),
    "between spaces": trained(pre_tokenizers.WhitespaceSplit(), normalizer="NFD"),
    "BERT": trained(pre_tokenizers.BertPreTokenizer(), kind="wordpiece", normalizer="NFKD"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_text_in_pieces_has_the_ids_of_the_whole(name: str) -> None:
    tokenizer = CUT[name]
    assert can_be_cut(tokenizer)

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(TEXTS, st.integers(1, 9))
    def check(text: str, piece: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "PIECE_CHARACTERS", piece)
            assert "".join(cut_at_words(text)) == text
            (found,) = encode(tokenizer, [text], cut=True)
        assert found.tolist() == tokenizer.encode(text, add_special_tokens=False).ids

    check()


def test_long_and_short_texts_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10)
    texts = [CORPUS[0], "short", CORPUS[0][5:], "a", "no_space_at_all" * 3]
    found = [ids.tolist() for ids in encode(CUT["GPT-2"], texts, cut=True)]
    assert found == [CUT["GPT-2"].encode(text).ids for text in texts]
    assert len(list(cut_at_words(CORPUS[0]))) > 3


def lowercase() -> Tokenizer:
    return trained(BYTES, normalizer="Lowercase")


def metaspace() -> Tokenizer:
    return trained(pre_tokenizers.Metaspace())


def other_pattern() -> Tokenizer:
    return trained(split(r"\w+ \w+|\s"))


def dropout() -> Tokenizer:
    tokenizer = trained(BYTES)
    tokenizer.model.dropout = 0.1
    return tokenizer


def added_words() -> Tokenizer:
    tokenizer = trained(BYTES)
    tokenizer.add_tokens([AddedToken("b c", special=False)])
    return tokenizer


@pytest.mark.parametrize("make", [lowercase, metaspace, other_pattern, dropout, added_words])
def test_a_tokenizer_whose_words_are_not_known_encodes_the_whole_and_says_so(
    make, speeches: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make()
    assert not can_be_cut(tokenizer)
    if make is metaspace:
        tokenizer.save(str(tmp_path / "t.json"))
        run([write_parquet(tmp_path / "s.parquet", list(speeches))], tmp_path / "t.json", tmp_path / "data")
        assert ENCODED_AS_A_WHOLE in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_from_elsewhere(speeches: list[str], source: Path, tmp_path: Path) -> None:
    """Its own begin token, a post-processor that adds it, truncation, padding, and CRLF line ends."""
    tokenizer = trained(BYTES)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    plain = tmp_path / "plain.json"
    tokenizer.save(str(plain))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100, pad_id=begin, pad_token="<s>")
    tokenizer.save(str(tmp_path / "special.json"))
    content = (tmp_path / "special.json").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "special.json").write_bytes(content)

    data = tmp_path / "data"
    files = [str(source), "--tokenizer", str(tmp_path / "special.json"), "--output", str(data)]
    options = ["--sequence-length", "64", "--validation-percent", "5", "--packing", "straight", "--processes", "1"]
    assert main(["data", "prepare", *files, *options, "--bos", "<s>"]) == 0
    assert main(["data", "verify", str(data), "--processes", "1"]) == 0
    assert (data / "tokenizer.json").read_bytes() == content
    assert Manifest.load(data).settings.bos == "<s>"
    run([source], plain, tmp_path / "expected", bos="<s>")
    train = TokenDataset(data, "train")
    expected = TokenDataset(tmp_path / "expected", "train")
    assert all(np.array_equal(train[row], expected[row]) for row in range(len(expected)))
    rows = np.stack([train[row] for row in range(len(train))])
    assert (rows == begin).sum() == 12, "one for each document"
    assert prompt_ids(read_tokenizer(data / "tokenizer.json"), "<s>", speeches[0]) == [
        begin,
        *CUT["GPT-2"].encode(speeches[0]).ids,
    ]


def test_a_missing_begin_token_is_named_with_its_remedy(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: has no token <s>; name the one .*: --bos TOKEN"):
        run([source], tokenizer, tmp_path / "data", bos="<s>")
