"""`mythos config`: the resolved, validated configuration."""

from typing import Annotated

import typer

from launch.arguments import Configuration
from mythos.config.arguments import split_arguments
from mythos.errors import DONE


def run(
    configuration: Configuration,
    ranks: Annotated[int, typer.Option(metavar="N", min=1, help="number of processes that it must fit")] = 1,
) -> int:
    """Print the resolved, validated configuration.

    Merges the files and overrides, validates the result, and prints the whole tree as YAML that can be used as a file
    again, each option with its meaning.
    """
    from mythos.config.load import load
    from mythos.config.show import documented_yaml

    files, overrides = split_arguments(configuration)
    print(documented_yaml(load(files, overrides, ranks)), end="")
    return DONE
