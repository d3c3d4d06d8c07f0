"""What the loop and the experts tell about a training step."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor


def depth_metrics(depths: np.ndarray, backprop_depth: int) -> dict[str, float]:
    """Mean loop steps of the global batch, and how many of them carried gradient."""
    return {"depth/mean": float(depths.mean()), "depth/with_grad": float(np.minimum(depths, backprop_depth).mean())}


def expert_metrics(load_LE: Tensor) -> dict[str, float]:
    """From the tokens that each expert of each layer got in one step, summed over ranks.

    ``moe/load_max_over_mean`` is 1 when balanced and E when one expert gets everything (the worst layer counts);
    ``moe/experts_unused`` counts experts without a single token, over all layers.
    """
    worst = (load_LE.amax(dim=1) / load_LE.mean(dim=1).clamp(min=1e-9)).max()
    return {"moe/load_max_over_mean": worst.item(), "moe/experts_unused": float((load_LE == 0).sum())}


def model_metrics(health: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """This rank's diagnostics from the model's forward passes, averaged over its micro batches."""
    if not health or not health[0]:
        return {}
    return {name: sum(part[name].item() for part in health) / len(health) for name in health[0]}
