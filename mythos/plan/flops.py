"""Model FLOPs: the floating-point operations that a model's equations require, however they are carried out.

Counted, 2 for each multiplication with its addition: the products with the weights of attention, feed-forward layers,
experts (those that a token goes to, and the shared ones), routers, adapters, injection, halting gate, readout and tied
head; attention's scores and values. Forward and backward pass together are 3 times the forward pass; a loop step
without gradient is 1 time. Not counted: lookups in tables, norms and other elementwise work, the loss, the optimizer,
diagnostics, and recomputation, which has a function of its own.

Attention is counted over the whole sequence (S keys for each query), as in the published tables, or with ``causal``
over the (S + 1) / 2 keys that a query has on average.
"""

from dataclasses import dataclass

import numpy as np

from mythos.config.depth_distribution import cumulative_distribution
from mythos.config.loop_schema import Loop
from mythos.config.model_schema import (
    VALUE_GATE_CHANNELS,
    Dense,
    GroupedQuery,
    Latent,
    Looped,
    MixtureOfExperts,
    has_value_embedding,
)
from mythos.plan.tensors import attention_shapes, feed_forward_shapes, matrix_elements, swiglu_shapes

FORWARD_AND_BACKWARD = 3
"""For each product of the forward pass the backward pass has two: the gradients of its input and of its weight."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs a token of one forward pass, by part."""

    prelude: float
    """The blocks before the loop; all blocks of a dense model."""
    loop_step: float
    """One step of the loop with its injection, adapters and halting gate; 0 for a dense model."""
    coda: float
    """The readout and the blocks after the loop; 0 for a dense model."""
    head: float

    def total(self, loop_steps: float) -> float:
        """FLOPs a token of the whole forward pass at this depth (of a dense model: 0)."""
        return self.prelude + self.loop_step * loop_steps + self.coda + self.head


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs a token of a forward and backward pass, by part; of a dense model in ``prelude`` and ``head``."""

    prelude: float
    loop: float
    coda: float
    head: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.prelude + self.loop + self.coda + self.head


@dataclass(frozen=True)
class LoopSteps:
    """How often a sequence runs the core, or the means of several sequences; a dense model has no loop steps."""

    without_grad: float = 0.0
    with_grad: float = 0.0


def executed_steps(depths: np.ndarray, loop: Loop | None) -> LoopSteps:
    """The mean loop steps of sequences whose depths were drawn."""
    if loop is None:
        return LoopSteps()
    with_grad = np.minimum(depths, loop.backprop_depth)
    return LoopSteps(float((depths - with_grad).mean()), float(with_grad.mean()))


def expected_steps(loop: Loop | None, mean: float | None = None) -> LoopSteps:
    """The expected loop steps of a sequence: E[T] - E[min(T, k)] and E[min(T, k)], where k = ``loop.backprop_depth``.

    Args:
        mean: mean depth at one step of the curriculum; ``loop.mean_depth`` by default.
    """
    if loop is None:
        return LoopSteps()
    # E[min(T, k)] is the sum of P(T > t) over t from 0 to k - 1.
    longer = 1 - cumulative_distribution(loop, loop.mean_depth if mean is None else mean)
    with_grad = float(longer[: loop.backprop_depth].sum())
    return LoopSteps(float(longer.sum()) - with_grad, with_grad)


def training_flops(
    model: Looped | Dense, sequence_length: int, steps: LoopSteps = LoopSteps(), causal: bool = False
) -> float:
    """FLOPs a token of a forward and backward pass; of a batch, times its tokens, with its mean ``executed_steps``."""
    return training_flops_by_part(model, sequence_length, steps, causal).total


def training_flops_by_part(
    model: Looped | Dense, sequence_length: int, steps: LoopSteps = LoopSteps(), causal: bool = False
) -> TrainingFlops:
    """The same, by part."""
    forward = forward_flops(model, sequence_length, causal)
    return TrainingFlops(
        prelude=FORWARD_AND_BACKWARD * forward.prelude,
        loop=(steps.without_grad + FORWARD_AND_BACKWARD * steps.with_grad) * forward.loop_step,
        coda=FORWARD_AND_BACKWARD * forward.coda,
        head=FORWARD_AND_BACKWARD * forward.head,
    )


def recomputation_flops(
    model: Looped | Dense, sequence_length: int, steps: LoopSteps = LoopSteps(), causal: bool = False
) -> float:
    """FLOPs a token that ``loop.recompute`` adds: the forward pass of every loop step with gradient once more."""
    return forward_flops(model, sequence_length, causal).loop_step * steps.with_grad


def inference_flops(
    model: Looped | Dense, sequence_length: int, loop_steps: float = 0.0, causal: bool = False
) -> float:
    """FLOPs a token of a forward pass at this depth over sequences of this length.

    Also of one token that is generated from a cache with ``sequence_length`` tokens, itself included, if the cache
    holds complete keys and values.
    """
    return forward_flops(model, sequence_length, causal).total(loop_steps)


def forward_flops(model: Looped | Dense, sequence_length: int, causal: bool = False) -> ForwardFlops:
    """FLOPs a token of a forward pass over sequences of this length, by part."""
    keys = (sequence_length + 1) / 2 if causal else sequence_length
    head = 2.0 * model.vocabulary_size * model.width
    feed_forward = 2.0 * matrix_elements(feed_forward_shapes(model.width, model.feed_forward))
    if isinstance(model, Dense):
        return ForwardFlops(_blocks(model, range(model.layers), model.layers, keys, feed_forward), 0.0, 0.0, head)
    first, end = model.prelude_layers, model.prelude_layers + model.core_layers
    layers = end + model.coda_layers
    in_core = feed_forward if model.core_experts is None else _experts(model.width, model.core_experts)
    return ForwardFlops(
        prelude=_blocks(model, range(first), layers, keys, feed_forward),
        loop_step=_blocks(model, range(first, end), layers, keys, in_core) + _beside_the_blocks(model),
        coda=2.0 * model.width**2 + _blocks(model, range(end, layers), layers, keys, feed_forward),
        head=head,
    )


def _blocks(model: Looped | Dense, numbers: range, layers: int, keys: float, feed_forward: float) -> float:
    """FLOPs a token of the blocks with these numbers, of ``layers`` in the model (a core layer counts once)."""
    attention = model.attention
    block = attention_flops(model.width, attention, keys) + feed_forward
    if not isinstance(attention, GroupedQuery):
        return len(numbers) * block
    gates = sum(has_value_embedding(model, number, layers) for number in numbers)
    return len(numbers) * block + gates * 2.0 * VALUE_GATE_CHANNELS * attention.kv_heads


def attention_flops(width: int, attention: GroupedQuery | Latent, keys: float) -> float:
    """FLOPs a token of one attention layer over so many keys, without a gate on value embeddings."""
    return 2.0 * matrix_elements(attention_shapes(width, attention)) + _scores_and_values(attention, keys)


def _scores_and_values(attention: GroupedQuery | Latent, keys: float) -> float:
    """FLOPs of one query of every head: with each key the score, with each value its share of the output."""
    match attention:
        case GroupedQuery():
            return 2.0 * keys * attention.heads * 2 * attention.head_size
        case Latent():
            query = attention.content_head_size + attention.rotary_head_size
            return 2.0 * keys * attention.heads * (query + attention.value_head_size)


def _experts(width: int, experts: MixtureOfExperts) -> float:
    routed = experts.experts_per_token * matrix_elements(swiglu_shapes(width, experts.expert_hidden_size))
    shared = matrix_elements(swiglu_shapes(width, experts.shared_hidden_size))
    return 2.0 * (width * experts.experts + routed + shared)


def _beside_the_blocks(model: Looped) -> float:
    """FLOPs a token of one loop step outside of attention and feed-forward layers."""
    width = model.width
    products = {"lti": 1, "lti_exact": 1, "linear": 2, "additive": 0}[model.injection]
    injection = products * width * width
    adapters = model.core_layers * 2 * model.adapter_rank * width
    return 2.0 * (injection + adapters + (width if model.halting else 0))
