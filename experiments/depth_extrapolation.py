"""Validation loss at up to 4 times the trained depth, for a model trained with random depth and one with fixed depth.

    python -m experiments.depth_extrapolation --data demo/data

writes depth_extrapolation.md and depth_extrapolation.png beside the runs; with --output docs it replaces those in
docs/.
"""

import argparse
import math
from pathlib import Path

from experiments.sweep import last, train_all

FILES = ["configs/model/tiny-looped.yaml", "configs/run/demo.yaml"]
MEAN_DEPTH = 4
DEPTHS = tuple(range(1, 4 * MEAN_DEPTH + 1))
KINDS = {"random depth": "poisson_per_sequence", "fixed depth": "fixed"}
COMMON = [
    "parallel.zero_stage=0",
    f"loop.mean_depth={MEAN_DEPTH}",
    "train.global_batch_sequences=8",
    "train.micro_batch_sequences=8",
    "train.steps=400",
    "checkpoint.every=1000",
    "eval.every=1000",
    f"eval.depths={list(DEPTHS)}".replace(" ", ""),
    "eval.sequences=32",
    "sample.tokens=0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/depth_extrapolation"))
    parser.add_argument("--output", type=Path, help="directory of the table and the plot (default: that of the runs)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    runs = {
        kind.replace(" ", "-"): [*COMMON, f"data.directory={arguments.data}", f"loop.depth={option}"]
        for kind, option in KINDS.items()
    }
    train_all(runs, FILES, arguments.runs, arguments.processes)
    curves = {
        kind: [last(arguments.runs / kind.replace(" ", "-"), f"val/loss_depth_{depth}") or math.nan for depth in DEPTHS]
        for kind in KINDS
    }
    output = arguments.output or arguments.runs
    (output / "depth_extrapolation.md").write_text(report(curves), encoding="utf-8")
    plot(curves, output / "depth_extrapolation.png")


def report(curves: dict[str, list[float]]) -> str:
    """The table as Markdown."""
    lines = [
        "# Loss at depths that were not trained",
        "",
        f"`python -m experiments.depth_extrapolation` (400 steps of 2,048 tokens, width 128, mean depth {MEAN_DEPTH}).",
        "",
        "| depth | " + " | ".join(curves) + " |",
        "|---|" + "---|" * len(curves),
    ]
    for number, depth in enumerate(DEPTHS):
        lines.append(f"| {depth} | " + " | ".join(f"{losses[number]:.4f}" for losses in curves.values()) + " |")
    return "\n".join([*lines, "", "![loss against depth](depth_extrapolation.png)", ""])


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Validation loss against the number of loop steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    for kind, losses in curves.items():
        axis.plot(DEPTHS, losses, "o-", markersize=3, label=f"trained with {kind}")
    axis.axvline(MEAN_DEPTH, color="gray", linewidth=0.8)
    axis.set(xlabel="loop steps", ylabel="validation loss")
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
