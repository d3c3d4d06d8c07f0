"""Cut long documents into passages, so that an evaluation of documents has many of them.

    python -m experiments.passages demo/sotu.parquet passages.parquet

A passage is whole sentences, at least 1,000 characters where the document has as many left.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CHARACTERS = 1000
SENTENCE = re.compile(r"(?<=[.!?]) ")


def passages(document: str) -> Iterator[str]:
    """The document in pieces; joined by a space, they are the document."""
    sentences, characters = list[str](), 0
    for sentence in SENTENCE.split(document):
        sentences.append(sentence)
        characters += len(sentence) + 1
        if characters > CHARACTERS:
            yield " ".join(sentences)
            sentences, characters = [], 0
    if sentences:
        yield " ".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    documents = pq.read_table(arguments.input, columns=["text"])["text"].to_pylist()
    texts = [passage for document in documents for passage in passages(document)]
    pq.write_table(pa.table({"text": texts}), arguments.output)
    print(f"{arguments.output}: {len(documents)} documents, {len(texts):,} passages")


if __name__ == "__main__":
    main()
