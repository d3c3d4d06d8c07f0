"""`mythos data verify`: check every file of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import Processes
from launch.data_ranks import lead_or_serve
from mythos.errors import BAD_INPUT, DONE

if TYPE_CHECKING:
    from data_prep.workers import Workers

DataDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="a directory that `mythos data prepare` wrote")]


def run(directory: DataDirectory, processes: Processes = None) -> int:
    """Check every file of a data set.

    Reads every shard: hashes, headers, ids below the vocabulary size, counts against index and manifest, and the
    tokenizer. Reports each bad file; the exit code is 2 if there is one.
    """

    def lead(workers: "Workers") -> int:
        from data_prep.progress import Progress
        from data_prep.verify import data_bytes, verify
        from mythos.run.console import print_note

        with Progress("reading", data_bytes(directory)) as progress:
            manifest, findings = verify(directory, workers, progress)
        for finding in findings:
            print_note(f"mythos: {finding}")
        if findings:
            return BAD_INPUT
        counts = ", ".join(f"{split} {counts.sequences:,} rows" for split, counts in manifest.splits.items())
        print(f"{directory}: valid; {counts}")
        return DONE

    return lead_or_serve(processes, lead)
