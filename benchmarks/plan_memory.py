"""The memory that `mythos plan` predicts against what the ranks of a training run on a CPU use.

    python -m benchmarks.plan_memory                 a table of ZeRO 0 to 3, recomputation, AdamW and Muon, two ranks

Measured is the largest resident set of a rank in its second step, less that of a rank which trains a tiny
model. Blocks of memory above 128 KiB are given back to the system at once (MALLOC_MMAP_THRESHOLD_), as on a GPU those
that PyTorch reserves but does not use are not counted either.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 17)

import torch

from mythos.config.load import validate
from mythos.config.schema import Config
from mythos.plan.layout import Layout
from mythos.plan.memory import memory
from mythos.plan.precision import element_bytes
from tests.spawn import RankPool

RANKS, SEQUENCES, LENGTH, DEPTH, STEPS = 2, 2, 128, 4, 2
LIMIT_S = 1500
ATTENTION = {"kind": "gqa", "heads": 7, "kv_heads": 7, "head_size": 128}
MODEL: dict[str, Any] = {
    "kind": "looped",
    "vocabulary_size": 32768,
    "width": 896,
    "prelude_layers": 2,
    "core_layers": 3,
    "coda_layers": 2,
    "attention": ATTENTION,
    "feed_forward": {"kind": "swiglu", "hidden_size": 2432},
}
"""99 million parameters."""
TINY: dict[str, Any] = MODEL | {"vocabulary_size": 64, "width": 64, "feed_forward": {"hidden_size": 64}}
TINY["attention"] = ATTENTION | {"heads": 1, "kv_heads": 1, "head_size": 64}
SETTINGS = [(stage, recompute, "adamw") for stage in range(4) for recompute in (True, False)]
SETTINGS += [(stage, True, "muon") for stage in range(4)]


def configuration(model: dict[str, Any], stage: int, recompute: bool, optimizer: str) -> Config:
    """One micro-step; every loop step carries gradient."""
    tree = {
        "run": {"directory": "none"},
        "device": "cpu",
        "model": model,
        "loop": {"mean_depth": DEPTH, "depth": "fixed", "backprop_depth": DEPTH, "recompute": recompute},
        "train": {"steps": 9, "global_batch_sequences": RANKS * SEQUENCES, "micro_batch_sequences": SEQUENCES},
        "optim": {"kind": optimizer, "learning_rate": 1e-3},
        "parallel": {"zero_stage": stage},
        "data": {"directory": "none", "sequence_length": LENGTH},
    }
    return validate(tree, RANKS)


def peak_bytes(config: Config) -> int:
    """The largest resident set of this rank in the last step."""
    from mythos.engine.engine import TrainingEngine
    from mythos.model.depth import fixed
    from mythos.plan.schedule import schedule

    engine = TrainingEngine(config, torch.device("cpu"))
    depths = fixed(DEPTH, SEQUENCES)
    for step in range(STEPS):
        if step == STEPS - 1:  # from here on the kernel counts anew
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        tokens = torch.randint(config.model.vocabulary_size, (SEQUENCES, LENGTH))
        engine.backward(engine(tokens, tokens, depths).total)
        engine.step(schedule(config.optim, step, config.train.steps))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(config: Config) -> float:
    """Of the rank that used most, in fresh processes."""
    pool = RankPool(RANKS)
    try:
        return max(pool.run(peak_bytes, config, timeout_s=LIMIT_S))
    finally:
        pool.close()


def main() -> None:
    """Print the table."""
    print("| ZeRO | recompute | optimizer | predicted, MiB | measured, MiB | predicted / measured |")
    print("|---|---|---|---|---|---|")
    wanted = [SETTINGS[int(number)] for number in sys.argv[1:]] or SETTINGS
    empty = measured(configuration(TINY, 3, True, "adamw"))
    for stage, recompute, optimizer in wanted:
        config = configuration(MODEL, stage, recompute, optimizer)
        size = element_bytes(config, on_gpu=False)
        found = memory(config, Layout(RANKS, RANKS), size, on_gpu=False, recompute=recompute)
        used = measured(config) - empty
        cells = (stage, "on" if recompute else "off", optimizer, f"{found.peak / 2**20:,.0f}", f"{used / 2**20:,.0f}")
        print(f"| {' | '.join(map(str, cells))} | {found.peak / used:.2f} |", flush=True)
        if "--kinds" in sys.argv:
            print(found)


if __name__ == "__main__":
    main()
