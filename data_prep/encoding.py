"""Token ids of texts in bounded memory: a long document is encoded in pieces, and has the same ids as in one.

While it encodes a text, the `tokenizers` library needs 100 to 200 times its size. A tokenizer encodes each word that
its pre-tokenizer finds by itself, so a text may be cut wherever a word is certain to begin: before a space that follows
another character than white space. That holds for the pre-tokenizers that ``can_be_cut`` lists, in whose words a space
is the first character or none.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 18
"""A document of more characters is cut. A stretch without spaces, which is not cut, makes a longer piece."""
ENCODED_AS_A_WHOLE = (
    "each document is encoded as a whole, in 100 to 200 times its size of memory, because it is not known where this "
    "tokenizer's words begin"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)
GPT_4 = {  # tiktoken's cl100k_base, whose groups have at most 3 digits
    digits: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,"
    + str(digits)
    + r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    for digits in (2, 3)
}
"""The pattern of GPT-4 by the number of digits that form a word."""
PATTERNS = (GPT_2, LLAMA_3, QWEN_2, *GPT_4.values())
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""No character before a space changes what follows it in these forms of Unicode, and the reverse."""


def can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its pieces, one after the other."""
    parts = json.loads(tokenizer.to_str())
    normalizer, splitter = parts["normalizer"], parts["pre_tokenizer"] or {}
    if splitter.get("type") == "Sequence":  # the steps after the first one cut its words further
        splitter = splitter["pretokenizers"][0]
    return (
        (normalizer is None or normalizer["type"] in NORMALIZERS)
        and _begins_words_at_spaces(splitter)
        and not parts["model"].get("dropout")
        and all(token["special"] for token in parts["added_tokens"])  # others are found in the text before the words
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str], cut: bool, dtype: str = "uint32") -> Iterator[np.ndarray]:
    """The ids of each text, without those that the tokenizer's post-processor adds.

    Args:
        cut: whether long texts are encoded in pieces; only for a tokenizer that ``can_be_cut``.
    """
    is_long = [cut and len(text) > PIECE_CHARACTERS for text in texts]
    short = [text for text, long in zip(texts, is_long, strict=True) if not long]
    encodings = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    for text, long in zip(texts, is_long, strict=True):
        if long:
            pieces = (tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0] for piece in cut_at_words(text))
            yield np.concatenate([np.array(piece.ids, dtype=dtype) for piece in pieces])
        else:
            yield np.array(next(encodings).ids, dtype=dtype)


def cut_at_words(text: str) -> Iterator[str]:
    """The text in pieces of at least PIECE_CHARACTERS; each of them after the first begins with a space."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + PIECE_CHARACTERS)
        while end > 0 and text[end - 1].isspace():
            end = text.find(" ", end + 1)
        yield text[start : end if end > 0 else None]
        start = end if end > 0 else len(text)


def _begins_words_at_spaces(splitter: dict[str, Any]) -> bool:
    match splitter:
        case {"type": "ByteLevel", "use_regex": True} | {"type": "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer"}:
            return True
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern in PATTERNS
    return False
