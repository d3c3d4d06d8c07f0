"""Parameters of a model, by part, from the configuration alone."""

from dataclasses import dataclass

from mythos.config.model_schema import (
    VALUE_GATE_CHANNELS,
    Dense,
    FeedForward,
    GroupedQuery,
    Latent,
    Looped,
    MixtureOfExperts,
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. ``idle`` are those of routed experts that a token does not go to."""

    parts: dict[str, int]
    idle: int

    @property
    def total(self) -> int:
        """All parameters; the tied output matrix is the token table and counts once."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses when every layer runs once; lookup tables count with all their rows."""
        return self.total - self.idle

    @property
    def tables(self) -> int:
        """Parameters in tables that are looked up by token."""
        return self.parts["token table"] + self.parts.get("value tables", 0)


def count_parameters(model: Looped | Dense) -> ParameterCount:
    """Count every parameter of the model."""
    width = model.width
    layers = model.layers if isinstance(model, Dense) else model.prelude_layers + model.core_layers + model.coda_layers
    parts = {"token table": model.vocabulary_size * width}
    parts |= _value_embeddings(model, layers)
    parts["attention"] = layers * (attention_matrices(width, model.attention) + _attention_norms(model.attention))
    idle, core_feed_forward = 0, 0
    if isinstance(model, Looped) and model.core_experts is not None:
        core_feed_forward = model.core_layers
        parts |= _experts(width, model.core_layers, model.core_experts)
        unchosen = model.core_experts.experts - model.core_experts.experts_per_token
        idle = unchosen * model.core_layers * swiglu_matrices(width, model.core_experts.expert_hidden_size)
    parts["feed-forward"] = (layers - core_feed_forward) * feed_forward_matrices(width, model.feed_forward)
    parts["norms"] = (2 * layers + 1) * width
    if isinstance(model, Looped):
        parts["norms"] += width  # after the prelude
        parts |= _loop(model)
    return ParameterCount({name: count for name, count in parts.items() if count}, idle)


def _value_embeddings(model: Looped | Dense, layers: int) -> dict[str, int]:
    attention = model.attention
    if not (isinstance(attention, GroupedQuery) and attention.value_embeddings):
        return {}
    tables = (layers + 1) // 2
    return {
        "value tables": tables * model.vocabulary_size * attention.kv_heads * attention.head_size,
        "value gates": tables * VALUE_GATE_CHANNELS * attention.kv_heads,
    }


def attention_matrices(width: int, attention: GroupedQuery | Latent) -> int:
    """Elements of the matrices of one attention layer, without a gate on value embeddings."""
    match attention:
        case GroupedQuery():
            return 2 * width * (attention.heads + attention.kv_heads) * attention.head_size
        case Latent():
            return _latent_attention(width, attention)


def _latent_attention(width: int, attention: Latent) -> int:
    query, latent, heads = attention.query_latent_size, attention.key_value_latent_size, attention.heads
    content, rotated, value = attention.content_head_size, attention.rotary_head_size, attention.value_head_size
    queries = width * query + query * heads * (content + rotated)
    keys_and_values = width * (latent + rotated) + latent * heads * (content + value)
    return queries + keys_and_values + heads * value * width


def _attention_norms(attention: GroupedQuery | Latent) -> int:
    """Scales of the norms inside one attention layer."""
    return attention.query_latent_size + attention.key_value_latent_size if isinstance(attention, Latent) else 0


def swiglu_matrices(width: int, hidden_size: int) -> int:
    """Elements of the matrices of one gated feed-forward layer or expert."""
    return 3 * width * hidden_size


def feed_forward_matrices(width: int, config: FeedForward) -> int:
    """Elements of the matrices of one dense feed-forward layer."""
    return swiglu_matrices(width, config.hidden_size) if config.kind == "swiglu" else 2 * width * config.hidden_size


def _experts(width: int, layers: int, experts: MixtureOfExperts) -> dict[str, int]:
    return {
        "routers": layers * width * experts.experts,
        "routed experts": layers * experts.experts * swiglu_matrices(width, experts.expert_hidden_size),
        "shared experts": layers * swiglu_matrices(width, experts.shared_hidden_size),
    }


def _loop(model: Looped) -> dict[str, int]:
    width = model.width
    injection = {"lti": width * width + 2 * width, "linear": 2 * width * width, "additive": 0}
    return {
        "injection": injection[model.injection],
        "readout C": width * width,
        "adapters": model.core_layers * model.adapter_loops * 2 * model.adapter_rank * width,
        "loop embeddings": model.loop_embeddings * width,
        "halting": width + 1 if model.halting else 0,
    }
