"""The tables of docs/plan.md: the ladder on 8 to 8,192 GPUs, and the parity models on 16.

    python -m benchmarks.plan_ladder

For each model and number of GPUs the layout that `mythos plan --search` ranks first. The global batch of the ladder is
16.8 million tokens, so that 8,192 GPUs have a sequence each.
"""

from pathlib import Path
from typing import Any

from mythos.config.load import load
from mythos.config.schema import Config
from mythos.plan.cluster import load_cluster
from mythos.plan.plan import Plan, make_plan
from mythos.plan.report import LAYOUT_HEADERS, binary, layout_cells
from mythos.plan.search import search

CONFIGS = Path(__file__).parents[1] / "configs"
LADDER = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")
GPUS = (8, 64, 512, 2048, 8192)
LADDER_BATCH = ["train.global_batch_tokens=16777216", "train.micro_batch_sequences=1"]
PARITY = ("looped-770m", "looped-moe-770m", "transformer-1.3b")
CLUSTER = load_cluster("h100")


def config_of(model: str, overrides: list[str]) -> Config:
    """The model with the run file of its name, or that of the flagship."""
    own = CONFIGS / "run" / f"{model}.yaml"
    run = own if own.exists() else CONFIGS / "run" / "pretrain.yaml"
    return load([CONFIGS / "model" / f"{model}.yaml", run], overrides, 1)


def cells(model: str, plan: Plan | None, needed: Plan | None) -> list[str]:
    """A row: the layout, or what the smallest one needs."""
    if plan is not None:
        return [model, *layout_cells(plan)[1:]]
    assert needed is not None
    row = layout_cells(needed)
    return [model, row[1], *("-" * len(row[2:7])), f"needs {binary(needed.memory.peak)}", *("-" * 4), "memory"]


def print_row(row: list[str]) -> None:
    """One row of a Markdown table."""
    print(f"| {' | '.join(row)} |", flush=True)


def print_head() -> None:
    """The head of both tables."""
    print_row(["model", *LAYOUT_HEADERS[1:]])
    print_row(["---"] * len(LAYOUT_HEADERS))


def ladder() -> None:
    """The first table."""
    print_head()
    for size in LADDER:
        config = config_of(f"mythos-{size}", LADDER_BATCH)
        for gpus in GPUS:
            found = search(config, CLUSTER, [gpus // CLUSTER.gpus_per_node], "time")
            print_row(cells(f"mythos-{size}", found.fitting[0] if found.fitting else None, found.least_memory))


def parity() -> None:
    """The second table: the best layout on 16 GPUs, and the shipped one."""
    print_head()
    for model in PARITY:
        config = config_of(model, ["train.micro_batch_sequences=1"])
        best = search(config, CLUSTER, [2], "time").fitting[0]
        print_row(cells(f"{model}, best", best, None))
        shipped: Any = config_of(model, [])
        print_row(cells(f"{model}, shipped", make_plan(shipped, 16, CLUSTER), None))


if __name__ == "__main__":
    parity()
    print()
    ladder()
