"""Training in its plainest form: one process, one batch at a time without accumulation, PyTorch without DeepSpeed."""

from pathlib import Path

import torch

from mythos.config.derive import global_batch_sequences
from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.model import build_model, depth
from mythos.model.moe import balance, expert_load, moe_layers
from tests.reference.muon import PlainMuon

BY_MUON = ("attention.", "feed_forward.", "adapter.")
HALVES = ("gate_up.weight", "key_value.weight", "gate_up_proj")


def train_plainly(config: Config, steps: int, skipped: frozenset[int] = frozenset()) -> list[tuple[float, float]]:
    """(cross-entropy, gradient norm) of every step: entire batch, autograd, clipping, torch's AdamW, plain Muon.

    The updates of the ``skipped`` steps (from 1) are left out.
    """
    torch.set_num_threads(1)
    model = build_model(config)
    optim, parameters, by_muon = config.optim, dict(model.named_parameters()), {}
    if optim.kind == "muon":
        by_muon = {
            name: p
            for name, p in parameters.items()
            if p.ndim >= 2 and any(part in name for part in BY_MUON) and "router" not in name
        }
    normalised = (optim.muon_beta2, optim.muon_decay_by_shape) if by_muon else ()
    muon = PlainMuon(by_muon, {name for name in by_muon if name.endswith(HALVES)}, *normalised)
    rest = {name: p for name, p in parameters.items() if name not in by_muon}
    matrices = [p for name, p in rest.items() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in rest.items() if p.ndim < 2 or "embedding" in name]
    adamw_decay = 0.0 if optim.kind == "muon" else optim.weight_decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": adamw_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=False,
    )
    dataset = TokenDataset(Path(config.data.directory), "train")
    stream = TokenStream([Source("data", 1.0, dataset)], config.seed, config.data.shuffle_shards)
    batch, curve = global_batch_sequences(config), []
    for step in range(1, steps + 1):
        rows = torch.from_numpy(stream.rows((step - 1) * batch, batch))
        plan = []
        if config.loop is not None:
            samples = range((step - 1) * batch, step * batch)
            depths = depth.draw_depths(config.loop, config.seed, step, samples)
            seeds = [depth.state_seed(config.seed, sample) for sample in samples]
            plan = [depth.plan(depths, config.loop.backprop_depth, slice(0, batch), seeds)]
        losses = model(rows[:, :-1], rows[:, 1:], *plan)
        load = expert_load(model) if moe_layers(model) else None
        model.zero_grad()
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clip)
        # warm-up, then the linear descent over the last part, written out
        descent_steps = steps * optim.cooldown_fraction
        scale = min(1, step / optim.warmup_steps) * min(1, (steps - step + 1) / descent_steps)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * scale
        if step not in skipped:
            optimizer.step()
            if optim.kind == "muon":
                warm = min(1, (step - 1) / optim.muon_momentum_warmup_steps)
                momentum = optim.muon_momentum_start + (optim.muon_momentum - optim.muon_momentum_start) * warm
                decay = optim.muon_weight_decay * (steps - step + 1) / steps
                muon.step(optim.muon_learning_rate * scale, momentum, decay)
            if load is not None:
                balance(model, load, config.model.core_experts.balance_rate)
        curve.append((losses.cross_entropy.item(), norm.item()))
    return curve
