"""`mythos params`: the parameters of a model, by part."""

import argparse
from typing import Any

from launch.config import add_config_arguments, split_configuration


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "params",
        help="print the parameters of a model by part, total and active",
        description="Count the parameters of a model from its configuration alone.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one line a part, then the sums."""
    from mythos.config.load import load_model
    from mythos.errors import DONE
    from mythos.plan.params import count_parameters

    count = count_parameters(load_model(*split_configuration(arguments.configuration)))
    for name, number in count.parts.items():
        print(f"{name:<24}{number:>22,}{number / count.total:>9.2%}")
    print(f"{'total':<24}{count.total:>22,}")
    print(f"{'active a token':<24}{count.active:>22,}{count.active / count.total:>9.2%}")
    print(f"{'of which lookup tables':<24}{count.tables:>22,}{count.tables / count.total:>9.2%}")
    return DONE
