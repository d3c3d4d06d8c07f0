"""`mythos data`: train a tokenizer, prepare or import a data set, verify it, show what is in it."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.workers import Workers
    from mythos.data.format import Manifest
    from mythos.ranks.world import World

# Kept here and not in data_prep: the help must not wait for pyarrow.
_DEFAULT_VALIDATION_PERCENT = 1.0
_PARALLEL = """\
In processes of its own on this machine (--processes), or on many machines once a process under a launcher:
  mpiexec -n 16 mythos data {command} ...
  srun --nodes=4 --ntasks-per-node=32 --kill-on-bad-exit=1 mythos data {command} ...
All need the same file system. The bytes written depend neither on the number of processes nor on how often the command
was killed: give it again, and it goes on with the parts that were finished.
"""


def add_parser(subparsers: Any) -> None:
    """Register `data` with the command line; each sub-command sets ``run``, a handler that returns an exit code."""
    parser = subparsers.add_parser("data", help="prepare text for training: Parquet -> tokens -> MDS shards")
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_tokenizer(commands)
    _add_prepare(commands)
    _add_import(commands)
    _add_verify(commands)
    _add_show(commands)


def _add_sources(parser: argparse.ArgumentParser, what: str, column: str) -> None:
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE.parquet", help=f"Parquet files with the {what}"
    )
    parser.add_argument(
        "--column", default=column, help=f"column with the {what}, a document a row (default: %(default)s)"
    )


def _add_tokenizer(commands: Any) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer",
        description="Train a byte-level BPE tokenizer on the train split of the text. The same text gives the same "
        "file. An existing output is replaced. FILE's stem + .training.json notes what was held out.",
    )
    _add_sources(parser, "text", "text")
    parser.add_argument(
        "--validation-percent",
        type=float,
        default=_DEFAULT_VALIDATION_PERCENT,
        metavar="PERCENT",
        help="share of the documents, chosen by the hash of their text, not to be seen; `data prepare` keeps the same "
        "for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary-size", type=int, default=32768, metavar="TOKENS", help="at least 257 (default: %(default)s)"
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="reserve an id for it after <|bos|>, such as '<|user|>' for a later chat format; may be repeated. "
        "Training needs none but <|bos|>",
    )
    parser.add_argument(
        "--sample-mb",
        type=float,
        default=500.0,
        metavar="MB",
        help="text to train on, from all over the sources; 100 MB take about 40 s and 0.75 GB (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where to write tokenizer.json")
    parser.set_defaults(run=run_tokenizer)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenise text and write it as shards",
        description="Tokenise the text, pack it into rows and write train and validation shards.\n"
        "Run again with the same sources and settings it does nothing.\n\n" + _PARALLEL.format(command="prepare"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(parser, "text", "text")
    _add_writing(parser)
    parser.set_defaults(run=run_prepare, content="text")


def _add_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="write token ids that were made elsewhere as shards",
        description="Pack documents that are token ids already, lists of integers, and write train and validation\n"
        "shards as `data prepare` does. Every id is checked against the tokenizer. A document that does not\n"
        "begin with <|bos|> gets it.\n\n" + _PARALLEL.format(command="import"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(parser, "token ids", "input_ids")
    _add_writing(parser)
    parser.set_defaults(run=run_prepare, content="token_ids")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json of `mythos data tokenizer`"
    )
    parser.add_argument(
        "--validation-percent",
        type=float,
        default=None,
        metavar="PERCENT",
        help="share of the documents, chosen by the hash of their content, kept for validation (default: what the "
        f"tokenizer was trained with, {_DEFAULT_VALIDATION_PERCENT} where it does not say)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="tokens a model sees at once; a row holds one more, the last target (default: %(default)s)",
    )
    parser.add_argument(
        "--packing",
        choices=("best_fit", "straight"),
        default="best_fit",
        help="best_fit: documents that fill rows together, few are cut; straight: end to end, cut where a row is full "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compression", choices=("none", "zstd"), default="none", help="of the shards (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size-mib", type=int, default=32, metavar="MIB", help="size of a shard file (default: %(default)s)"
    )
    _add_processes(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the new data set")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="local processes, without a launcher (default: one for each core that may be used)",
    )


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every file of a data set",
        description="Read every shard of a data set: hashes, headers, ids below the vocabulary, counts against index "
        "and manifest, the tokenizer. Each bad file is named; exit code 2 when there is one.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `mythos data prepare` wrote")
    _add_processes(parser)
    parser.set_defaults(run=run_verify)


def _add_show(commands: Any) -> None:
    parser = commands.add_parser("show", help="print rows of a prepared data set as text")
    parser.add_argument("directory", type=Path, metavar="DIR", help="what `mythos data prepare` wrote")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default: %(default)s")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="the first one to show (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2, metavar="ROWS", help="how many rows (default: %(default)s)")
    parser.add_argument("--ids", action="store_true", help="print the token ids instead")
    parser.set_defaults(run=run_show)


def run_tokenizer(arguments: argparse.Namespace) -> int:
    """Handle `mythos data tokenizer`."""
    from data_prep.train_tokenizer import train_tokenizer

    started = time.monotonic()
    vocabulary_size, note = train_tokenizer(
        sources=arguments.sources,
        column=arguments.column,
        vocabulary_size=arguments.vocabulary_size,
        output=arguments.output,
        validation_percent=arguments.validation_percent,
        sample_bytes=arguments.sample_mb * 1e6,
        special_tokens=arguments.special_token,
    )
    held_out = (
        f"{note.bytes_per_token:.3f} bytes/token on {note.held_out_bytes / 1e6:.2f} MB held out"
        if note.bytes_per_token
        else "no document of the sample was held out to measure bytes/token on"
    )
    print(
        f"{arguments.output}: {vocabulary_size:,} tokens from {note.text_bytes / 1e6:.1f} MB; {held_out}; "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


def run_prepare(arguments: argparse.Namespace) -> int:
    """Handle `mythos data prepare` and `mythos data import`."""
    return _lead_or_serve(arguments, _prepare)


def run_verify(arguments: argparse.Namespace) -> int:
    """Handle `mythos data verify`."""
    return _lead_or_serve(arguments, _verify)


def _lead_or_serve(arguments: argparse.Namespace, lead: Callable[[argparse.Namespace, "Workers"], int]) -> int:
    """Rank 0 leads; the other ranks do what it hands out, and end with its exit code."""
    from mythos.ranks.world import read_world

    with read_world() as world:
        _check_launcher(world, arguments.processes)
        from data_prep.workers import Workers, serve

        if world.rank > 0:
            exit_code = serve(world)
            if exit_code:
                sys.exit(exit_code)  # not an end at which MPI waits for the others
            return exit_code
        processes = 1 if world.world_size > 1 else arguments.processes or len(os.sched_getaffinity(0))
        with Workers(world, processes) as workers:
            return lead(arguments, workers)


def _check_launcher(world: "World", processes: int | None) -> None:
    from mythos.errors import UserError

    if processes is not None and processes < 1:
        raise UserError(f"processes {processes}: give at least 1")
    if world.world_size > 1 and processes is not None:
        raise UserError(f"processes {processes}: {world.world_size} ranks do the work; leave --processes out")
    if world.world_size > 1 and world.launcher == "torchrun":
        raise UserError("started by torchrun, whose port is taken: use mpiexec or srun, or --processes alone")


def _prepare(arguments: argparse.Namespace, workers: "Workers") -> int:
    from data_prep.prepare import prepare, settings_for

    started = time.monotonic()
    settings = settings_for(
        arguments.tokenizer,
        arguments.validation_percent,
        column=arguments.column,
        shard_size_mib=arguments.shard_size_mib,
        packing=arguments.packing,
        compression=None if arguments.compression == "none" else arguments.compression,
        content=arguments.content,
    )
    manifest, is_new = prepare(
        sources=arguments.sources,
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        sequence_length=arguments.sequence_length,
        settings=settings,
        workers=workers,
    )
    _report(arguments.output, manifest, time.monotonic() - started if is_new else None)
    return 0


def _report(output: Path, manifest: "Manifest", elapsed_s: float | None) -> None:
    per_split = "; ".join(
        f"{split} {counts.documents:,} documents ({counts.documents_cut:,} cut), {counts.tokens:,} tokens, "
        f"{counts.sequences:,} sequences"
        + (f", {counts.bytes_per_token:.2f} bytes/token" if counts.bytes_per_token else "")
        for split, counts in manifest.splits.items()
    )
    if elapsed_s is None:
        how = "already prepared with these settings, nothing done"
    else:
        # Of imported ids whose text is not known, the size of the files.
        text_bytes = [counts.text_bytes for counts in manifest.splits.values() if counts.text_bytes is not None]
        megabytes = (sum(text_bytes) or sum(source.bytes for source in manifest.sources)) / 1e6
        how = f"{megabytes:.1f} MB in {elapsed_s:.1f} s, {megabytes / elapsed_s:.1f} MB/s"
    print(f"{output}: {per_split}; {how}")


def _verify(arguments: argparse.Namespace, workers: "Workers") -> int:
    from data_prep.progress import Progress
    from data_prep.verify import data_bytes, verify
    from mythos.errors import BAD_INPUT, DONE

    with Progress("reading", data_bytes(arguments.directory)) as progress:
        manifest, findings = verify(arguments.directory, workers, progress)
    for finding in findings:
        print(f"mythos: {finding}", file=sys.stderr)
    if findings:
        return BAD_INPUT
    counts = ", ".join(f"{split} {counts.sequences:,} rows" for split, counts in manifest.splits.items())
    print(f"{arguments.directory}: whole; {counts}")
    return DONE


def run_show(arguments: argparse.Namespace) -> int:
    """Handle `mythos data show`."""
    from data_prep.show import rows_as_text

    for row in rows_as_text(arguments.directory, arguments.split, arguments.row, arguments.count, arguments.ids):
        print(row)
    return 0
