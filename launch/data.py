"""`mythos data`: train a tokenizer, prepare a data set, show what is in it."""

import argparse
import time
from pathlib import Path
from typing import Any

# Kept here and not in data_prep: the help must not wait for pyarrow.
_DEFAULT_VALIDATION_PERCENT = 1.0


def add_parser(subparsers: Any) -> None:
    """Register `data` with the command line; each sub-command sets ``run``, a handler that returns an exit code."""
    parser = subparsers.add_parser("data", help="prepare text for training: Parquet -> tokens -> MDS shards")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_tokenizer(commands)
    _add_prepare(commands)
    _add_show(commands)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE.parquet", help="Parquet files with the text")
    parser.add_argument("--column", default="text", help="text column, a document a row (default: %(default)s)")
    parser.add_argument(
        "--validation-percent",
        type=float,
        default=_DEFAULT_VALIDATION_PERCENT,
        metavar="PERCENT",
        help="share of the documents, chosen by the hash of their text, kept for validation; give `data tokenizer` and "
        "`data prepare` the same, or validation text reaches the tokenizer (default: %(default)s)",
    )


def _add_tokenizer(commands: Any) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer",
        description="Train a byte-level BPE tokenizer on the train split of the text. The same text gives the same "
        "file. An existing output is replaced.",
    )
    _add_source_arguments(parser)
    parser.add_argument(
        "--vocabulary-size", type=int, default=32768, metavar="TOKENS", help="at least 257 (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where to write tokenizer.json")
    parser.set_defaults(run=run_tokenizer)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenise text and write it as shards",
        description="Tokenise the text, pack it into rows and write train and validation shards. Run again with the "
        "same sources and settings it does nothing; a run that is stopped leaves no data set behind.",
    )
    _add_source_arguments(parser)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json from `mythos data tokenizer`"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="tokens a model sees at once; a row holds one more, the last target (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size-mib", type=int, default=32, metavar="MIB", help="size of a shard file (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the new data set")
    parser.set_defaults(run=run_prepare)


def _add_show(commands: Any) -> None:
    parser = commands.add_parser("show", help="print the first rows of a prepared data set as text")
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `mythos data prepare` wrote")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=2, metavar="ROWS", help="how many rows (default: %(default)s)")
    parser.set_defaults(run=run_show)


def run_tokenizer(arguments: argparse.Namespace) -> int:
    """Handle `mythos data tokenizer`."""
    from data_prep.train_tokenizer import train_tokenizer

    started = time.monotonic()
    vocabulary_size = train_tokenizer(
        sources=arguments.sources,
        column=arguments.column,
        vocabulary_size=arguments.vocabulary_size,
        output=arguments.output,
        validation_percent=arguments.validation_percent,
    )
    print(f"{arguments.output}: {vocabulary_size:,} tokens, {time.monotonic() - started:.1f} s")
    return 0


def run_prepare(arguments: argparse.Namespace) -> int:
    """Handle `mythos data prepare`."""
    from data_prep.write_shards import prepare

    started = time.monotonic()
    manifest, is_new = prepare(
        sources=arguments.sources,
        column=arguments.column,
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        sequence_length=arguments.sequence_length,
        validation_percent=arguments.validation_percent,
        shard_size_mib=arguments.shard_size_mib,
    )
    elapsed_s = time.monotonic() - started
    per_split = "; ".join(
        f"{split} {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.sequences:,} sequences, "
        f"{counts.bytes_per_token:.2f} bytes/token"
        for split, counts in manifest.splits.items()
    )
    text_megabytes = sum(counts.text_bytes for counts in manifest.splits.values()) / 1e6
    if is_new:
        how = f"{text_megabytes:.1f} MB in {elapsed_s:.1f} s, {text_megabytes / elapsed_s:.1f} MB/s"
    else:
        how = "already prepared with these settings, nothing done"
    print(f"{arguments.output}: {per_split}; {how}")
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Handle `mythos data show`."""
    from tokenizers import Tokenizer

    from mythos.data.format import TOKENIZER_FILE, read_data_file
    from mythos.data.stream import TokenDataset

    dataset = TokenDataset(arguments.directory, arguments.split)
    tokenizer = Tokenizer.from_str(read_data_file(arguments.directory / TOKENIZER_FILE))
    for number in range(min(arguments.count, len(dataset))):
        row = dataset[number]
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        print(f"--- {arguments.split} row {number} of {len(dataset)}, {len(row)} tokens\n{text}")
    return 0
