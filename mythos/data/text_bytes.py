"""How many bytes of text each token stands for."""

import json

import numpy as np
from tokenizers import Tokenizer


def text_bytes_of_ids(encoder: Tokenizer) -> np.ndarray | None:
    """Bytes of text per id, int64 of shape (vocabulary,); None for tokenizers that are not byte-level.

    The vocabulary of a byte-level tokenizer represents each byte by one character. Special tokens count as no text.
    """
    decoder = json.loads(encoder.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    vocabulary = encoder.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, token_id in vocabulary.items():
        sizes[token_id] = len(token)
    for token_id, added in encoder.get_added_tokens_decoder().items():
        sizes[token_id] = 0 if added.special else len(added.content.encode())
    return sizes
