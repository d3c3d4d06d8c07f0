"""`mythos job`: what a batch script needs before it starts the ranks."""

from typing import Annotated

import typer

from launch.arguments import Accept, Configuration
from mythos.config.arguments import split_arguments
from mythos.errors import DONE


def run(
    configuration: Configuration,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="nodes of the job")],
    tasks_per_node: Annotated[int, typer.Option(metavar="N", min=1, help="processes on each node")],
    accept: Accept = None,
) -> int:
    """Check a job's configuration, for batch scripts.

    Prints the number of nodes to use and the run directory.

    The configuration is validated for all nodes of the job, or, if the global batch does not divide over them, for the
    largest number of nodes over which it does.
    """
    from mythos.config.consent import check_names
    from mythos.config.load import load_for_most

    check_names(accept or ())
    sizes = [count * tasks_per_node for count in range(nodes, 0, -1)]
    config, processes = load_for_most(*split_arguments(configuration), sizes)
    print(processes // tasks_per_node, config.run.directory)
    return DONE
