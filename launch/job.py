"""`mythos job`: what a batch script has to know before it starts the ranks."""

import argparse
from typing import Any

from launch.config import add_config_arguments, positive, split_configuration


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "job",
        help="for batch scripts: check a configuration, print the number of nodes to use and the run directory",
        description="Validate the configuration for the job's nodes, or, where the global batch does not divide over "
        "all of them, for as many as it does. Prints that number and the run directory.",
    )
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=positive, required=True, metavar="N", help="nodes of the job")
    parser.add_argument("--tasks-per-node", type=positive, required=True, metavar="N", help="processes on each")
    parser.add_argument("--accept-changes", action="store_true", help="for `mythos train`, which gets the same words")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print ``NODES RUN_DIRECTORY``."""
    from mythos.config.load import load_for_most
    from mythos.errors import DONE

    sizes = [nodes * arguments.tasks_per_node for nodes in range(arguments.nodes, 0, -1)]
    config, processes = load_for_most(*split_configuration(arguments.configuration), sizes)
    print(processes // arguments.tasks_per_node, config.run.directory)
    return DONE
