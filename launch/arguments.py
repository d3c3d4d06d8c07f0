"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Configuration = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE.yaml|key=value",
        help="YAML files (later ones win), then options that override them, for example optim.learning_rate=2e-4",
    ),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="OPTION",
        help="resume the run although this option (or an option in this section) or its data has changed; repeatable",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")]
RunOverrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="options that override the run's")]
Step = Annotated[
    int | None,
    typer.Option("--step", metavar="N", min=0, help="step of the checkpoint (default: the newest complete one)"),
]
Processes = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="local processes, without a launcher (default: one for each core available to it)"
    ),
]
