"""The published models and their training, written from the equations of arXiv 2604.12946 alone.

One sequence at a time, one process, autograd: no module, no parameter group and no schedule of Mythos. Shared are the
start (the weights by name), the rows of tokens, the depth of each sequence and the seed of its first state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.muon import PlainMuon

Weights = dict[str, Tensor]
EPSILON, QK_EPSILON, ROPE_BASE, GATE_CHANNELS = 1e-5, 1.1920929e-7, 50_000.0, 32
BACKPROP = 4


@dataclass(frozen=True)
class Shape:
    """Layers before, in and after the loop; a standard transformer has all of them before."""

    heads: int
    prelude: int
    core: int = 0
    coda: int = 0


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()


def rotate(x: Tensor) -> Tensor:
    """Channels i and i + C/2 of position p are a complex number, which turns by p base^(-2i/C)."""
    length, channels = x.shape
    frequency = ROPE_BASE ** (-2 * torch.arange(channels // 2) / channels)
    turn = torch.exp(1j * torch.arange(length)[:, None] * frequency)
    turned = torch.complex(x[:, : channels // 2], x[:, channels // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), dim=1)


def attention(w: Weights, at: str, x: Tensor, value: Tensor | None, heads: int) -> Tensor:
    q, (k, v) = x @ w[f"{at}.query.weight"].T, (x @ w[f"{at}.key_value.weight"].T).chunk(2, dim=1)
    outputs = []
    for head, (q_h, k_h, v_h) in enumerate(zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)):
        if value is not None:
            gate = 2 * torch.sigmoid(x[:, :GATE_CHANNELS] @ w[f"{at}.value_gate.weight"][head])
            v_h = v_h + gate[:, None] * value.chunk(heads, 1)[head]
        q_h, k_h = rms_norm(rotate(q_h), QK_EPSILON), rms_norm(rotate(k_h), QK_EPSILON)
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[1])
        future = torch.ones_like(scores).triu(1).bool()
        outputs.append(scores.masked_fill(future, -math.inf).softmax(dim=1) @ v_h)
    return torch.cat(outputs, dim=1) @ w[f"{at}.out.weight"].T


def block(w: Weights, at: str, x: Tensor, value: Tensor | None, heads: int) -> Tensor:
    normed = rms_norm(x, EPSILON) * w[f"{at}.attention_norm.weight"]
    x = x + attention(w, f"{at}.attention", normed, value, heads)
    normed = rms_norm(x, EPSILON) * w[f"{at}.feed_forward_norm.weight"]
    return x + (normed @ w[f"{at}.feed_forward.up.weight"].T).relu() ** 2 / 2 @ w[f"{at}.feed_forward.down.weight"].T


def logits(w: Weights, shape: Shape, tokens: Tensor, depth: int, seed: int) -> Tensor:
    """Of one sequence (S,), for every position (S, V)."""
    layers = shape.prelude + shape.core + shape.coda
    with_table = [layer for layer in range(layers) if layer % 2 == (layers - 1) % 2]
    values = {layer: w[f"value_embeddings.tables.{layer}.weight"][tokens] for layer in with_table}

    def blocks(x: Tensor, at: str, first: int, count: int) -> Tensor:
        for number in range(count):
            x = block(w, f"{at}.{number}", x, values.get(first + number), shape.heads)
        return x

    x = blocks(w["embedding.weight"][tokens], "prelude" if shape.core else "blocks", 0, shape.prelude)
    if shape.core:
        e = rms_norm(x, EPSILON) * w["prelude_norm.weight"]
        h = iterate(w, e, depth, seed, lambda h: blocks(h, "loop.core", shape.prelude, shape.core))
        x = blocks(h @ w["readout.weight"].T, "coda", shape.prelude + shape.core, shape.coda)
    return rms_norm(x, EPSILON) * w["head.norm.weight"] @ w["embedding.weight"].T


def iterate(w: Weights, e: Tensor, depth: int, seed: int, core: Callable[[Tensor], Tensor]) -> Tensor:
    """h <- core(a h + dt B e); only the last steps carry gradient."""
    # Noise with the tables' deviation, within 3 of them: the quantiles of uniform numbers from the sequence's seed
    inside = math.erf(3 / math.sqrt(2))
    uniform = torch.empty(e.shape).uniform_(-inside, inside, generator=torch.Generator().manual_seed(seed))
    h = math.sqrt(2 / (5 * e.shape[1])) * torch.distributions.Normal(0, 1).icdf((1 + uniform.double()) / 2).float()
    for step in range(depth):
        with torch.set_grad_enabled(step >= depth - BACKPROP):
            dt = torch.log1p(torch.exp(w["loop.injection.step_bias"]))
            a = torch.exp(-dt * torch.exp(w["loop.injection.log_decay"]))
            h = core(a * h + dt * (e @ w["loop.injection.input.weight"].T))
    return h


class PlainAdamW:
    """Adam without weight decay, bias corrected: betas 0.8 and 0.95, epsilon 1e-10."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights, self.updates = weights, 0
        self.means = [torch.zeros_like(weight) for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.updates += 1
        for weight, mean, square in zip(self.weights, self.means, self.squares, strict=True):
            assert weight.grad is not None
            mean.mul_(0.8).add_(0.2 * weight.grad)
            square.mul_(0.95).add_(0.05 * weight.grad**2)
            size = (square / (1 - 0.95**self.updates)).sqrt() + 1e-10
            weight -= rate * mean / (1 - 0.8**self.updates) / size


def train_as_published(
    w: Weights,
    shape: Shape,
    batches: Sequence[Tensor],
    depths: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    rate: float,
) -> tuple[list[float], Weights]:
    """The loss of every step on the batches (rows of tokens, one more than the targets), and the weights at the end."""
    steps = len(batches)
    w = {name: weight.detach().clone().requires_grad_() for name, weight in w.items()}
    by_muon = {name: x for name, x in w.items() if x.ndim == 2 and (".attention." in name or ".feed_forward." in name)}
    halves = {name for name in by_muon if name.endswith("key_value.weight")}
    muon = PlainMuon(by_muon, halves, beta2=0.95, decay_by_shape=True)
    adamw = PlainAdamW([x for name, x in w.items() if name not in by_muon])
    curve = []
    for step, rows in enumerate(batches):
        losses = [
            F.cross_entropy(logits(w, shape, row[:-1], depth, seed), row[1:])
            for row, depth, seed in zip(rows, depths[step], seeds[step], strict=True)
        ]
        loss = torch.stack(losses).mean()
        for weight in w.values():
            weight.grad = None
        loss.backward()
        norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in w.values()))
        for weight in w.values():
            weight.grad *= min(1, 1 / norm)
        # No warm-up, constant, then linear to 0 over the last half; momentum to 0.95 over 300 steps; decay to 0.
        scale = min(1, (steps - step) / (steps / 2))
        adamw.step(rate * scale)
        muon.step(8e-3 * scale, 0.85 + 0.1 * min(1, step / 300), 0.2 * (1 - step / steps))
        curve.append(loss.item())
    return curve, w
