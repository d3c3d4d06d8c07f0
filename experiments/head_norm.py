"""What a start near the logarithm of the vocabulary costs or gains: `init.head_norm` for both kinds of model.

    python -m experiments.head_norm --data demo/data

prints a table. The models are the proxies with half of their layers, trained for 100 steps of 512 tokens.
"""

import argparse
from pathlib import Path

from experiments.sweep import train_all
from mythos.run.metrics import read_metrics

RECIPE, RUN = "configs/recipe/mythos.yaml", "configs/run/demo.yaml"
MODELS = {
    "standard": ["model.layers=3"],
    "looped": [
        *(f"model.{part}_layers=1" for part in ("prelude", "core", "coda")),
        "loop.mean_depth=4",
        "eval.depths=[4]",
    ],
}
FILES = {"standard": "configs/model/proxy-transformer.yaml", "looped": "configs/model/proxy-looped.yaml"}
STEPS = (0, 20, 100)
COMMON = [
    "parallel.zero_stage=0",
    "optim.learning_rate=8e-3",
    "optim.warmup_steps=0",
    "train.global_batch_sequences=2",
    "train.micro_batch_sequences=2",
    f"train.steps={STEPS[-1]}",
    "checkpoint.every=1000",
    "eval.every=20",
    "eval.sequences=16",
    "sample.tokens=0",
]
STARTS = ("ones", "small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/head_norm"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print("| model | init.head_norm | seed | " + " | ".join(f"step {step}" for step in STEPS) + " |")
    print("|---|---|---|" + "---|" * len(STEPS))
    for model, file in FILES.items():
        runs = {
            f"{model}-{start}-{seed}": [
                *COMMON,
                *MODELS[model],
                f"data.directory={arguments.data}",
                f"init.head_norm={start}",
                f"seed={seed}",
            ]
            for start in STARTS
            for seed in range(arguments.seeds)
        }
        train_all(runs, [file, RECIPE, RUN], arguments.runs, arguments.processes)
        for name in runs:
            kind, start, seed = name.split("-")
            lines = {
                line["step"]: line["val/loss"] for line in read_metrics(arguments.runs / name) if "val/loss" in line
            }
            losses = " | ".join(f"{lines[step]:.4f}" for step in STEPS)
            print(f"| {kind} | {start} | {seed} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
