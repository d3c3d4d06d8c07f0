"""The effect of the constraint rho < 1: spectral radius and loss for several seeds, learning rates and injections.

    python -m experiments.stability --data demo/data --processes 2

writes stability.md and stability.png beside the runs; with --output docs it replaces those in
docs/.
"""

import argparse
from pathlib import Path

from experiments.sweep import last, train_all

FILES = ["configs/model/tiny-looped.yaml", "configs/run/demo.yaml"]
INJECTIONS = ("lti", "linear", "additive")
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (1, 2, 3)
COMMON = [
    "model.width=64",
    "model.attention.heads=2",
    "model.attention.kv_heads=2",
    "model.feed_forward.hidden_size=256",
    "loop.mean_depth=8",
    "parallel.zero_stage=0",
    "train.global_batch_sequences=4",
    "train.micro_batch_sequences=4",
    "train.steps=300",
    "optim.warmup_steps=10",
    "optim.cooldown=constant",
    "checkpoint.every=1000",
    "eval.every=1000",
    "eval.depths=[8]",
    "eval.sequences=16",
    "sample.tokens=0",
    "log.every=5",
]


def run_name(injection: str, rate: float, seed: int) -> str:
    return f"{injection}-{rate:g}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--output", type=Path, help="directory of the table and the plot (default: that of the runs)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    runs = {
        run_name(injection, rate, seed): [
            *COMMON,
            f"data.directory={arguments.data}",
            f"model.injection={injection}",
            f"optim.learning_rate={rate}",
            f"seed={seed}",
        ]
        for seed in SEEDS
        for rate in LEARNING_RATES
        for injection in INJECTIONS
    }
    train_all(runs, FILES, arguments.runs, arguments.processes)
    output = arguments.output or arguments.runs
    (output / "stability.md").write_text(report(arguments.runs), encoding="utf-8")
    plot(arguments.runs, output / "stability.png")


def values(runs: Path, metric: str, injection: str, rate: float) -> list[float]:
    """The last finite value of the metric for each seed; infinity if there is none."""
    found = [last(runs / run_name(injection, rate, seed), metric) for seed in SEEDS]
    return [float("inf") if value is None else value for value in found]


def report(runs: Path) -> str:
    """The table as Markdown."""
    lines = [
        "# Stability of the injection",
        "",
        "`python -m experiments.stability` (3 seeds, 300 steps of 1,024 tokens, width 64, mean depth 8, AdamW, "
        "constant rate). Validation loss at depth 8: lowest and highest of the seeds; largest spectral radius at the "
        "end; updates skipped because a loss or gradient was not finite.",
        "",
        "| injection | learning rate | validation loss | spectral radius | skipped updates |",
        "|---|---|---|---|---|",
    ]
    for injection in INJECTIONS:
        for rate in LEARNING_RATES:
            losses = values(runs, "val/loss_depth_8", injection, rate)
            radius = max(values(runs, "loop/spectral_radius", injection, rate))
            skipped = sum(values(runs, "train/skipped_steps", injection, rate))
            lines.append(
                f"| {injection} | {rate:g} | {min(losses):.3f} to {max(losses):.3f} | {radius:.3f} | {skipped:.0f} |"
            )
    return "\n".join([*lines, "", "![loss and spectral radius](stability.png)", ""])


def plot(runs: Path, path: Path) -> None:
    """Loss and spectral radius at the end against the learning rate, one line per injection, one point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for injection, color in zip(INJECTIONS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for axis, metric in ((left, "val/loss_depth_8"), (right, "loop/spectral_radius")):
            points = [values(runs, metric, injection, rate) for rate in LEARNING_RATES]
            axis.plot(LEARNING_RATES, [sorted(point)[1] for point in points], color=color, label=injection)
            for seed in range(len(SEEDS)):
                axis.plot(LEARNING_RATES, [point[seed] for point in points], "o", color=color, markersize=3)
    right.axhline(1.0, color="gray", linewidth=0.8)
    for axis, label in ((left, "validation loss at depth 8"), (right, "spectral radius")):
        axis.set(xscale="log", xlabel="learning rate (AdamW)", ylabel=label)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
