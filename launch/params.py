"""`mythos params`: the parameters of a model, by part."""

from launch.arguments import Configuration
from launch.table import Column, print_table
from mythos.config.arguments import split_arguments
from mythos.errors import DONE

COLUMNS = (Column("part"), Column("parameters", is_number=True), Column("share", is_number=True))


def run(configuration: Configuration) -> int:
    """Print the parameters of a model by part, total and active.

    The count needs the model's configuration alone.
    """
    from mythos.config.load import load_model
    from mythos.plan.params import count_parameters

    count = count_parameters(load_model(*split_arguments(configuration)))
    sums = {"total": count.total, "active per token": count.active, "of which lookup tables": count.tables}
    rows = [(name, f"{number:,}", f"{number / count.total:.2%}") for name, number in (count.parts | sums).items()]
    print_table(COLUMNS, rows)
    return DONE
