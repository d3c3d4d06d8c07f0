"""The step time that `mythos plan` predicts against that of training steps on this machine, for six shapes.

    python -m benchmarks.plan_time

Two ranks, ZeRO as named, with the peaks that were measured just before as the cluster. All times are the CPU time of a
rank: it is the step time of a machine that does nothing else, and hardly depends on what else runs. Collectives that
wait for the other rank use no CPU, so a step of a rank that is ahead is not counted as longer.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mythos.config.load import validate
from mythos.config.schema import Config
from mythos.plan.cluster import load_cluster
from mythos.plan.plan import make_plan
from tests.spawn import RankPool

RANKS, STEPS, LIMIT_S = 2, 3, 1200
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 4, "head_size": 64}
MLA = {
    "kind": "mla",
    "heads": 4,
    "query_latent_size": 192,
    "key_value_latent_size": 128,
    "content_head_size": 64,
    "rotary_head_size": 32,
    "value_head_size": 64,
}
BASE: dict[str, Any] = {"vocabulary_size": 4096, "width": 256, "attention": GQA, "feed_forward": {"hidden_size": 768}}
DENSE = BASE | {"kind": "dense", "layers": 6}
LOOPED = BASE | {"kind": "looped", "prelude_layers": 2, "core_layers": 2, "coda_layers": 2}
EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_hidden_size": 256, "shared_hidden_size": 256}
SHAPES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "dense, ZeRO 0": (DENSE, 0, False),
    "dense, width 512, ZeRO 2": (
        DENSE | {"width": 512, "attention": GQA | {"heads": 8, "kv_heads": 8}, "feed_forward": {"hidden_size": 1536}},
        2,
        False,
    ),
    "looped, ZeRO 3, recomputed": (LOOPED, 3, True),
    "looped, ZeRO 1": (LOOPED, 1, False),
    "looped with experts, ZeRO 3": (LOOPED | {"core_experts": EXPERTS}, 3, False),
    "looped, latent attention, ZeRO 2": (LOOPED | {"attention": MLA}, 2, False),
}


def configuration(model: dict[str, Any], stage: int, recompute: bool) -> Config:
    """Four sequences of 256 tokens a rank; four loop steps, two of them with gradient."""
    tree: dict[str, Any] = {
        "run": {"directory": "none"},
        "device": "cpu",
        "model": model,
        "train": {"steps": 9, "global_batch_sequences": 4 * RANKS, "micro_batch_sequences": 4},
        "optim": {"learning_rate": 1e-3},
        "parallel": {"zero_stage": stage},
        "data": {"directory": "none", "sequence_length": 256},
    }
    if model["kind"] == "looped":
        tree["loop"] = {"mean_depth": 4, "depth": "fixed", "backprop_depth": 2, "recompute": recompute}
    return validate(tree, RANKS)


def cpu_seconds(work: Callable[[], object], times: int) -> float:
    """CPU time of one call, after one to warm up; the least of three means."""
    work()
    means = []
    for _ in range(3):
        begun = time.process_time()
        for _ in range(times):
            work()
        means.append((time.process_time() - begun) / times)
    return min(means)


def peaks() -> tuple[float, float, float, float]:
    """FLOP/s, bytes/s of memory, bytes/s that a rank sends, and seconds of a small message."""
    size = 512
    left, right, out = (torch.randn(size, size) for _ in range(3))
    source, to = torch.zeros(1 << 25), torch.zeros(1 << 25)
    large, small = torch.zeros(1 << 22), torch.zeros(8)
    flops = 2 * size**3 / cpu_seconds(lambda: torch.mm(left, right, out=out), 20)
    memory = 2 * source.numel() * 4 / cpu_seconds(lambda: to.copy_(source), 2)
    sent = large.numel() * 4 / cpu_seconds(lambda: dist.all_reduce(large), 2)
    return flops, memory, sent, cpu_seconds(lambda: dist.all_reduce(small), 20)


def step_seconds(config: Config) -> float:
    """CPU time of a step."""
    import numpy as np

    from mythos.engine.engine import TrainingEngine
    from mythos.model.depth import plan
    from mythos.plan.schedule import schedule

    engine = TrainingEngine(config, torch.device("cpu"))

    def step() -> None:
        tokens = torch.randint(config.model.vocabulary_size, (4, 256))
        depths = None if config.loop is None else plan(np.full(4 * RANKS, 4), 2, slice(0, 4), range(4))
        engine.backward(engine(tokens, tokens, depths).total)
        engine.step(schedule(config.optim, 0, config.train.steps))

    step()
    step()
    return cpu_seconds(step, STEPS)


def main() -> None:
    """Print the table."""
    pool = RankPool(RANKS)
    flops, memory, sent, latency = (sum(values) / RANKS for values in zip(*pool.run(peaks), strict=True))
    print(f"measured: {flops / 1e9:.0f} GFLOP/s, {memory / 1e9:.1f} GB/s, {sent / 1e9:.2f} GB/s sent, {latency:.1e} s")
    figures = {
        "peak_flops.fp32": flops,
        "memory_bandwidth": memory,
        "inside.bandwidth": sent,
        "inside.latency_s": latency,
    }
    cluster = load_cluster("cpu", [f"cluster.{name}={value}" for name, value in figures.items()])
    print("| shape | predicted, s | measured, s | predicted / measured |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        config = configuration(*shape)
        planned = make_plan(config, RANKS, cluster).time
        found = pool.run(step_seconds, config, timeout_s=LIMIT_S)
        used = sum(found) / RANKS
        print(f"| {name} | {planned.total:.3g} | {used:.3g} | {planned.total / used:.2f} |", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
