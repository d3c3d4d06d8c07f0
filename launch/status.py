"""`mythos status`: how a run stands, from its directory alone."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "status",
        help="tell how a run stands, from its directory alone",
        description="State (running, preempted, finished, failed and why), step, tokens, loss, speed, time left, "
        "newest checkpoint, Slurm jobs. Needs no running process.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the status."""
    from mythos.errors import DONE
    from mythos.run.status import describe, read_status

    status = read_status(arguments.directory)
    print(status.to_json() if arguments.json else describe(status))
    return DONE
