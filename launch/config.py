"""`mythos config`: the resolved, validated configuration."""

import argparse
from typing import Any

OVERRIDES_HELP = "options that win over the files, for example optim.learning_rate=2e-4"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command with a configuration takes."""
    parser.add_argument(
        "configuration",
        nargs="+",
        metavar="FILE.yaml|key=value",
        help="YAML files (later ones win), then " + OVERRIDES_HELP,
    )


def split_configuration(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and overrides: what contains ``=`` is an override."""
    return [part for part in arguments if "=" not in part], [part for part in arguments if "=" in part]


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        help="print the resolved, validated configuration",
        description="Merge and validate a configuration and print the whole tree, each option with its meaning.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="number of processes it must fit (default: 1)"
    )
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """A number of processes or nodes, from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Print the tree as YAML that can be used as a file again."""
    from mythos.config.load import load
    from mythos.config.show import documented_yaml
    from mythos.errors import DONE

    files, overrides = split_configuration(arguments.configuration)
    print(documented_yaml(load(files, overrides, arguments.ranks)), end="")
    return DONE
