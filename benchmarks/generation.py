"""Tokens per second with a cache of keys and values and without, by length of the context.

One sequence, a looped model with random weights at its mean depth, fp32. Without a cache every token costs a complete
pass over the context. The two alternate in one process, and the median of their rounds counts.

    python -m benchmarks.generation
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mythos.model import Model, build_model, new_cache
from mythos.model.depth import fixed
from mythos.plan.cache import cache_bytes
from tests.tiny import LATENT, tiny_config

CONTEXTS, TOKENS, ROUNDS, DEPTH, WIDTH = (32, 128, 512), 8, 5, 8, 256
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "gqa", "heads": 8, "kv_heads": 2, "head_size": 32},
    "mla": LATENT
    | {
        "heads": 8,
        "query_latent_size": 128,
        "key_value_latent_size": 64,
        "content_head_size": 32,
        "rotary_head_size": 16,
        "value_head_size": 32,
    },
}


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(model: Model, context: int) -> tuple[float, float]:
    """Tokens per second with a cache and without."""
    ids_1S = torch.randint(4096, (1, context + ROUNDS * TOKENS))
    device, plan = torch.device("cpu"), fixed(DEPTH, 1)
    cache = new_cache(model, [context], ids_1S.shape[1], DEPTH, device)
    model(ids_1S[:, :context], cache=cache)

    def with_cache() -> None:
        for _ in range(TOKENS):
            place = cache.longest
            model(ids_1S[:, place : place + 1], cache=cache)

    found: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        found[0].append(TOKENS / seconds(with_cache))
        found[1].append(1 / seconds(lambda: model(ids_1S[:, :context], None, plan)))
    return statistics.median(found[0]), statistics.median(found[1])


@torch.no_grad()
def main() -> None:
    """Print a row for each attention and context."""
    print(f"{'attention':<10}{'context':>8}{'with, /s':>10}{'without, /s':>13}{'ratio':>7}{'cache, KiB':>12}")
    for name, attention in ATTENTIONS.items():
        sizes = {"model__width": WIDTH, "model__vocabulary_size": 4096, "model__feed_forward__hidden_size": 4 * WIDTH}
        config = tiny_config("looped", Path("unused"), Path("unused"), model__attention=attention, **sizes)
        model = build_model(config).eval()
        assert isinstance(model, Model)
        for context in CONTEXTS:
            cached, plain = rates(model, context)
            kib = cache_bytes(config.model, DEPTH, context, 4) / 1024
            print(f"{name:<10}{context:>8}{cached:>10.1f}{plain:>13.1f}{cached / plain:>7.1f}{kib:>12,.0f}", flush=True)


if __name__ == "__main__":
    main()
