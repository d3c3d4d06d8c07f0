"""Train a byte-level BPE tokenizer on the train split of Parquet text.

Byte-level: every text can be encoded and decodes to itself, so there is no unknown token. The merges, and so the file,
are the same for the same documents whatever the number of threads.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data_prep.documents import count_documents, read_documents, split_of
from mythos.data.format import BOS
from mythos.errors import UserError
from mythos.files import write_atomically

SMALLEST_VOCABULARY = 257  # the 256 bytes and BOS


def train_tokenizer(
    sources: list[Path], column: str, vocabulary_size: int, output: Path, validation_percent: float
) -> int:
    """Write a tokenizer file and return its vocabulary size: fewer than asked where the text has too few pairs.

    BOS has id 0. Only documents of the train split are seen, so nothing of the validation text reaches the vocabulary.
    Raises UserError for an unusable source, a vocabulary below 257, or when no document falls in the train split.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary-size {vocabulary_size}: give at least {SMALLEST_VOCABULARY}, the 256 bytes and {BOS}"
        )
    documents = count_documents(sources, column)
    seen = 0

    def train_documents() -> Iterator[str]:
        nonlocal seen
        # disable=None: a progress bar on a terminal only.
        for text in tqdm(read_documents(sources, column), total=documents, unit=" documents", disable=None):
            if split_of(text, validation_percent) == "train":
                seen += 1
                yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS],
        # All 256 bytes, also those that the text does not hold.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_documents(), trainer=trainer)
    if not seen:
        names = ", ".join(str(source) for source in sources)
        raise UserError(f"{names}: no text for the train split; give more documents or a lower --validation-percent")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, tokenizer.to_str(pretty=True))
    return tokenizer.get_vocab_size()
