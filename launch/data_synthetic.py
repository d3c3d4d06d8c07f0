"""`mythos data synthetic`: tasks that need many steps of reasoning, as shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mythos.errors import DONE


def run(
    task: Annotated[
        Literal["p_hop", "addition", "permutations"],
        typer.Option(
            help="p_hop: go back to the previous occurrence of a symbol and take the next one, p times; addition: of "
            "two numbers of n digits; permutations: the product of n permutations of five things"
        ),
    ],
    difficulty: Annotated[int, typer.Option(metavar="N", min=1, help="highest p or n in training")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="directory of the new data set")],
    rows: Annotated[int, typer.Option(metavar="ROWS", min=1, help="of the training split")],
    test_difficulty: Annotated[
        int | None, typer.Option(metavar="N", help="highest p or n in validation (default: twice --difficulty)")
    ] = None,
    validation_rows: Annotated[
        int, typer.Option(metavar="ROWS", min=1, help="of the validation split, for each difficulty")
    ] = 16,
    sequence_length: Annotated[
        int, typer.Option(metavar="TOKENS", min=2, help="context length; a row holds one token more, the last target")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="of the problems")] = 0,
) -> int:
    """Write a synthetic task as a data set.

    A row holds examples, `<|bos|> problem <|answer|> answer <|end|>`, and only the answers count in the loss. Training
    has the difficulties from 1 to --difficulty; validation has problems that are not in training, in as many rows of
    each difficulty, also beyond those of training. The same options give the same bytes.
    """
    from data_prep.synthetic import Order, make
    from mythos.errors import UserError

    most = 2 * difficulty if test_difficulty is None else test_difficulty
    if most < difficulty:
        raise UserError(f"--test-difficulty {most}: below --difficulty {difficulty}: give at least {difficulty}")
    manifest, is_new = make(Order(task, difficulty, most, rows, validation_rows, sequence_length, seed), output)
    summary = "; ".join(
        f"{split} {counts.documents:,} problems in {counts.sequences:,} rows, {counts.counted_targets:,} answer tokens"
        for split, counts in manifest.splits.items()
    )
    print(f"{output}: {summary}" + ("" if is_new else "; already made with these options, nothing to do"))
    return DONE
