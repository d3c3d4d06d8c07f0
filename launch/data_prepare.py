"""`mythos data prepare` and `mythos data import`: text, or token ids made elsewhere, into shards."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.arguments import Processes
from launch.data_ranks import lead_or_serve
from launch.data_tokenizer import DEFAULT_VALIDATION_PERCENT
from mythos.errors import DONE

if TYPE_CHECKING:
    from data_prep.workers import Workers
    from mythos.data.format import Manifest

_PREPARE = """Tokenise text and write it as shards.

Tokenises the text, packs it into rows and writes train and validation shards.
"""
_IMPORT = """Write token ids that were made elsewhere as shards.

Packs documents that are already token ids (lists of integers) and writes train and validation shards as `data prepare`
does. Every id is checked against the tokenizer. The token of --bos is added to documents that do not begin with it.
"""
_PARALLEL = """
Runs in local processes (--processes), or as one process per core on many machines, under a launcher:

\b
  mpiexec -n 16 mythos data {command} ...
  srun --nodes=4 --ntasks-per-node=32 --kill-on-bad-exit=1 mythos data {command} ...

All processes need the same file system. Under srun they also need the same home directory, where rank 0 leaves a
secret by which they recognise each other, or MYTHOS_JOB_TOKEN set to one. The bytes written do not depend on the number
of processes. If preparation is interrupted, run the same command again: finished parts are kept. Once the data set is
complete, the same command changes nothing.
"""
_ValidationPercent = Annotated[
    float | None,
    typer.Option(
        metavar="PERCENT",
        help="share of the documents, chosen by the hash of their content, kept for validation (default: the "
        f"tokenizer's, or {DEFAULT_VALIDATION_PERCENT} if it records none)",
    ),
]
_Packing = Annotated[
    Literal["best_fit", "straight", "crop"],
    typer.Option(
        help="best_fit: choose documents that fill a row together, few are cut; straight: one after the other, cut "
        "where a row is full; crop: each row begins with a document, the rest of a document that is cut is dropped"
    ),
]


def _command(content: Literal["text", "token_ids"], what: str, default_column: str) -> Callable[..., int]:
    """The command for one kind of content."""

    def run(
        sources: Annotated[list[Path], typer.Argument(metavar="SOURCE.parquet", help=f"Parquet files with the {what}")],
        tokenizer: Annotated[Path, typer.Option(metavar="FILE", help="tokenizer.json of `mythos data tokenizer`")],
        output: Annotated[Path, typer.Option(metavar="DIR", help="directory of the new data set")],
        column: Annotated[str, typer.Option(help=f"column with the {what}, one document per row")] = default_column,
        validation_percent: _ValidationPercent = None,
        sequence_length: Annotated[
            int, typer.Option(metavar="TOKENS", help="context length; a row holds one token more, the last target")
        ] = 2048,
        packing: _Packing = "best_fit",
        compression: Annotated[Literal["none", "zstd"], typer.Option(help="of the shards")] = "none",
        shard_size_mib: Annotated[int, typer.Option(metavar="MIB", help="size of a shard file")] = 32,
        bos: Annotated[
            str | None,
            typer.Option(metavar="TOKEN", help="the tokenizer's token that begins each document (default: <|bos|>)"),
        ] = None,
        processes: Processes = None,
    ) -> int:
        def lead(workers: "Workers") -> int:
            from data_prep.prepare import prepare, settings_for
            from mythos.data.format import BOS

            started = time.monotonic()
            settings = settings_for(
                tokenizer,
                validation_percent,
                column=column,
                shard_size_mib=shard_size_mib,
                packing=packing,
                compression=None if compression == "none" else compression,
                content=content,
                bos=bos or BOS,
            )
            manifest, is_new = prepare(sources, tokenizer, output, sequence_length, settings, workers)
            _print_summary(output, manifest, time.monotonic() - started if is_new else None)
            return DONE

        return lead_or_serve(processes, lead)

    return run


run_prepare = _command("text", what="text", default_column="text")
run_prepare.__doc__ = _PREPARE + _PARALLEL.format(command="prepare")
run_import = _command("token_ids", what="token ids", default_column="input_ids")
run_import.__doc__ = _IMPORT + _PARALLEL.format(command="import")


def _print_summary(output: Path, manifest: "Manifest", elapsed_s: float | None) -> None:
    per_split = "; ".join(
        f"{split} {counts.documents:,} documents ({counts.documents_cut:,} cut), {counts.tokens:,} tokens, "
        f"{counts.tokens_dropped:,} dropped, {counts.sequences:,} sequences"
        + (f", {counts.text_tokens:,} text tokens at {counts.positions:,} positions" if counts.positions else "")
        + (f", {counts.bytes_per_token:.2f} bytes/token" if counts.bytes_per_token else "")
        for split, counts in manifest.splits.items()
    )
    if elapsed_s is None:
        how = "already prepared with these settings, nothing to do"
    else:
        # The size of the text; for imported ids, whose text is not known, the size of the files.
        text_bytes = [counts.text_bytes for counts in manifest.splits.values() if counts.text_bytes is not None]
        megabytes = (sum(text_bytes) or sum(source.bytes for source in manifest.sources)) / 1e6
        how = f"{megabytes:.1f} MB in {elapsed_s:.1f} s, {megabytes / elapsed_s:.1f} MB/s"
    print(f"{output}: {per_split}; {how}")
