"""Activations: what the forward pass keeps for the backward pass, in bytes a token.

Counted from the modules in ``mythos.model``: the inputs of every matrix product, of norms and of products of two
tensors; queries, keys, values and output of attention (a fused kernel keeps no scores), and what AutoEP's layer keeps.
With recomputation a loop step keeps its input state only; one loop step at a time is then kept completely.
"""

from dataclasses import dataclass

import numpy as np

from mythos.config.depth_distribution import cumulative_distribution
from mythos.config.loop_schema import Loop
from mythos.config.model_schema import Dense, GroupedQuery, Latent, Looped, MixtureOfExperts, has_value_embedding
from mythos.config.schema import Config
from mythos.plan.precision import Bytes

FP32 = 4
ROUTING_BYTES = 36
"""For each expert of a token: its number three times (int64), and its weight three times (fp32)."""
HALTING_BYTES = 40
"""Probabilities, weights and masks of adaptive computation time."""
CHUNK_LOGITS = {False: 1 << 24, True: 1 << 27}
"""Logits that the loss has in memory at a time, on a CPU and on a GPU; ``mythos.loss`` uses these numbers."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes a token."""

    outside: float
    """Everything outside of the loop; all of a dense model."""
    loop_step: float
    """One loop step with gradient."""
    state: float
    """What a recomputed loop step keeps: its input state."""


def token_bytes(model: Looped | Dense, length: int, size: Bytes) -> TokenBytes:
    """What the model keeps of each token of sequences of this length."""
    width = model.width
    layers = model.layers if isinstance(model, Dense) else model.prelude_layers + model.core_layers + model.coda_layers
    embeddings = 2 * FP32 * 2  # tokens and targets, int64
    head = _norm(width, size)
    feed_forward = _feed_forward(model, size)
    if isinstance(model, Dense):
        blocks = _blocks(model, range(layers), layers, length, feed_forward, size)
        return TokenBytes(embeddings + blocks + head, 0.0, 0.0)
    first, end = model.prelude_layers, model.prelude_layers + model.core_layers
    outer = (*range(first), *range(end, layers))
    blocks = _blocks(model, outer, layers, length, feed_forward, size)
    readout = width * size.products
    state = float(width * size.residual)
    if model.halting:
        state += width * FP32 + HALTING_BYTES
    inside = _experts(width, model.core_experts, size) if model.core_experts else feed_forward
    step = _blocks(model, range(first, end), layers, length, inside, size) + _injection(model, size)
    step += model.core_layers * model.adapter_rank * size.products
    if model.halting:
        step += HALTING_BYTES
    return TokenBytes(embeddings + blocks + _norm(width, size) + readout + head, step, state)


def steps_kept(loop: Loop | None, sequences: int) -> float:
    """Loop steps with gradient in the deepest micro batch of a run, summed over its sequences.

    Nearly every run has a micro batch whose sequences are all as deep as gradient goes, unless the depth is fixed.
    """
    if loop is None:
        return 0.0
    possible = int(np.searchsorted(cumulative_distribution(loop, loop.mean_depth), 1 - 1e-9))
    return float(sequences * min(loop.backprop_depth, possible))


def kept_bytes(config: Config, size: Bytes, recompute: bool) -> float:
    """Bytes that the deepest micro batch of a rank keeps between its forward and its backward pass."""
    sequences, length = config.train.micro_batch_sequences, config.data.sequence_length
    each = token_bytes(config.model, length, size)
    steps = steps_kept(config.loop, sequences)
    loop = each.state * steps + each.loop_step * sequences if recompute and steps else each.loop_step * steps
    return length * (each.outside * sequences + loop)


def prelude_bytes(config: Config, size: Bytes) -> float:
    """Bytes of these that belong to the blocks before the loop; none of a dense model."""
    if isinstance(config.model, Dense):
        return 0.0
    each = token_bytes(config.model, config.data.sequence_length, size).outside
    share = config.model.prelude_layers / (config.model.prelude_layers + config.model.coda_layers)
    return config.train.micro_batch_sequences * config.data.sequence_length * each * share


def _norm(width: int, size: Bytes) -> float:
    """Input, the reciprocal of the root mean square, and output, which a matrix product keeps."""
    unfused = 0 if size.fused_norms else width * FP32
    return width * size.residual + FP32 + unfused + width * size.products


def _blocks(
    model: Looped | Dense, numbers: range | tuple[int, ...], layers: int, length: int, feed_forward: float, size: Bytes
) -> float:
    norms = 2 * _norm(model.width, size)
    return sum(
        norms + _attention(model.attention, length, has_value_embedding(model, number, layers), size) + feed_forward
        for number in numbers
    )


def _attention(attention: GroupedQuery | Latent, length: int, value_gate: bool, size: Bytes) -> float:
    heads = attention.heads
    match attention:
        case GroupedQuery():
            queries, keys = heads * attention.head_size, attention.kv_heads * attention.head_size
            before_norm = (queries + keys) * size.products + (heads + attention.kv_heads) * FP32
            values = keys if value_gate else 2 * keys  # without a gate a view of the projection's output
            gate = (2 * attention.kv_heads + keys) * FP32 if value_gate else 0
            attended = 2 * queries + keys + values
            return before_norm * attention.qk_norm + attended * size.products + gate + heads * FP32
        case Latent():
            query, latent = attention.query_latent_size, attention.key_value_latent_size
            content, rotated, value = (
                attention.content_head_size,
                attention.rotary_head_size,
                attention.value_head_size,
            )
            latents = (query + latent + rotated + query + latent) * size.products + 2 * FP32
            latents += 0 if size.fused_norms else (query + latent) * FP32
            scores = heads * FP32 if size.fused_attention else 2 * heads * length * size.products
            attended = heads * (2 * (content + rotated) + 2 * value + (content if size.fused_attention else 0))
            return latents + attended * size.products + scores


def _feed_forward(model: Looped | Dense, size: Bytes) -> float:
    hidden = model.feed_forward.hidden_size * size.products
    return (4 if model.feed_forward.kind == "swiglu" else 2) * hidden


def _experts(width: int, experts: MixtureOfExperts, size: Bytes) -> float:
    """AutoEP's layer: rows in, gate, up, silu(gate), their product; rows out, which are weighted in fp32."""
    routed = experts.experts_per_token * (
        (width + 4 * experts.expert_hidden_size) * size.products + width * FP32 + ROUTING_BYTES
    )
    return experts.experts * FP32 + routed + 4 * experts.shared_hidden_size * size.products


def _injection(model: Looped, size: Bytes) -> float:
    match model.injection:
        case "lti" | "lti_exact":
            rounded = model.width * size.products if size.products != size.residual else 0
            return model.width * (size.residual + FP32) + rounded
        case "linear":
            return 2.0 * model.width * size.products
        case "additive":
            return 0.0
