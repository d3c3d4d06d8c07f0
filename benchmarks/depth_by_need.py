"""Quality against loop steps spent: every token takes the same number of steps, or as many as it needs.

Of validation rows the first tokens are the prompt, which takes all steps. Then each further token is given to the model
with a cache, one position at a time as in generation, and the loss of its successor is measured: at fixed depths, and
with each token leaving the loop when a step changes its state by less than a share (eval.exit_change), and, in a model
with halting, when its halting weights are used up (eval.exit_when_halted).

    python -m benchmarks.depth_by_need RUN [key=value ...]
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.checkpoint.trained import Trained, load_trained
from mythos.config.derive import text_ids
from mythos.data.open import open_data
from mythos.eval.batches import validation_rows
from mythos.eval.forward import exit_rule
from mythos.model import new_cache
from mythos.run.paths import found_from_here

ROWS, PROMPT, TOKENS = 32, 32, 96
SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


@torch.no_grad()
def measure(trained: Trained, rows_RS: Tensor, depth: int, **leaving: Any) -> tuple[float, float]:
    """Loop steps and loss in nats of a token, means over all tokens after the prompts.

    Args:
        leaving: the options of leaving the loop, in place of the run's own.
    """
    options = {"exit_change": None, "exit_when_halted": False} | leaving
    model, rule = trained.model, exit_rule(replace(cast(Any, trained.config.eval), **options))
    cache = new_cache(model, [PROMPT] * len(rows_RS), PROMPT + TOKENS, depth, torch.device("cpu"))
    model(rows_RS[:, :PROMPT], cache=cache)
    steps, losses = [], []
    for place in range(PROMPT, PROMPT + TOKENS):
        logits_RV = model(rows_RS[:, place : place + 1], None, None, rule, cache=cache)  # type: ignore[arg-type]
        losses.append(F.cross_entropy(logits_RV, rows_RS[:, place + 1]).item())
        steps.append(cache.loop_steps_B.float().mean().item())
    return float(np.mean(steps)), float(np.mean(losses))


def main() -> None:
    """Print a row for each setting."""
    run = Path(sys.argv[1])
    trained = load_trained(run, None, ["device=cpu", *sys.argv[2:]])
    config = found_from_here(trained.config, run)
    assert config.loop is not None, "a dense model has no loop"
    data = open_data(config.data, text_ids(config.model), config.seed, 1).validation[0].dataset
    rows_RS = torch.from_numpy(data.read(validation_rows(data, ROWS)).astype(np.int64))
    mean = round(config.loop.mean_depth)
    settings: list[tuple[str, int, dict[str, Any]]] = [(f"depth {depth}", depth, {}) for depth in range(1, mean + 1)]
    settings += [(f"up to {mean}, change {share}", mean, {"exit_change": share}) for share in SHARES]
    if getattr(config.model, "halting", None) is not None:
        settings += [(f"up to {most}, halted", most, {"exit_when_halted": True}) for most in (mean, 2 * mean)]
    print(f"{'setting':<24}{'loop steps':>11}{'nats a token':>14}")
    for name, depth, leaving in settings:
        steps, loss = measure(trained, rows_RS, depth, **leaving)
        print(f"{name:<24}{steps:>11.2f}{loss:>14.4f}", flush=True)


if __name__ == "__main__":
    main()
