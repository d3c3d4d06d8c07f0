"""The part of the configuration tree that describes a model: what its weights are, and nothing about the run."""

from typing import Annotated, Literal

from mythos.config.option import Field, Needs, option, section

VALUE_GATE_CHANNELS = 32
"""Channels of an attention layer's input from which the gate on the value embedding is computed: the first ones."""
CACHE_BLOCK_TOKENS = 64
"""A cache of keys and values is allocated in blocks of so many tokens."""


@section
class GroupedQuery:
    """Grouped-query attention; multi-head attention when ``kv_heads`` equals ``heads``."""

    kind: Literal["gqa"] = option("gqa: grouped-query attention")
    heads: int = option("number of query heads", gt=0)
    kv_heads: int = option("number of key and value heads; divides heads", gt=0)
    head_size: int = option("channels of one head; even, for rotary embedding", gt=0)
    rope_base: float = option("base of the rotary frequencies", 50_000.0, gt=1)
    qk_norm: bool = option("RMS-normalise queries and keys after rotation (no learned scale)", True)
    qk_norm_epsilon: float = option(
        "added to the mean square in that norm; the code of arXiv 2604.12946: the smallest step of the type, "
        "1.1920929e-7 in fp32",
        1e-6,
        gt=0,
        needs=Needs("model.attention.qk_norm"),
    )
    value_embeddings: bool = option(
        "add a table looked up by the input token to the values of every second layer", False
    )


@section
class Latent:
    """Multi-head latent attention: queries, keys and values through small latents."""

    kind: Literal["mla"] = option("mla: multi-head latent attention")
    heads: int = option("number of heads", gt=0)
    query_latent_size: int = option("channels of the queries' latent", gt=0)
    key_value_latent_size: int = option("channels of the keys' and values' latent, which is what a cache keeps", gt=0)
    content_head_size: int = option("channels of a head's query and key without rotation", gt=0)
    rotary_head_size: int = option("channels of a head's query and of the shared key with rotation; even", gt=0)
    value_head_size: int = option("channels of a head's value", gt=0)
    rope_base: float = option("base of the rotary frequencies", 50_000.0, gt=1)


Attention = Annotated[GroupedQuery | Latent, Field(discriminator="kind")]


@section
class FeedForward:
    """The dense feed-forward layer."""

    kind: Literal["swiglu", "relu2"] = option("swiglu (gated) or relu2 (squared ReLU, no gate)", "swiglu")
    hidden_size: int = option("channels inside the layer", gt=0)
    relu2_factor: float = option(
        "factor on the output of relu2; the code of arXiv 2604.12946: 0.5",
        1.0,
        gt=0,
        needs=Needs("model.feed_forward.kind", ("relu2",)),
    )


@section
class MixtureOfExperts:
    """Routed experts and shared experts in place of the core's feed-forward layers."""

    experts: int = option("number of routed experts", gt=1)
    experts_per_token: int = option("routed experts that each token goes to", gt=0)
    expert_hidden_size: int = option("channels inside one routed expert", gt=0)
    shared_hidden_size: int = option("channels inside the shared experts, taken together", gt=0)
    scores: Literal["sigmoid", "softmax"] = option("how router logits become scores", "sigmoid")
    normalise: bool = option("scale the chosen experts' scores to sum 1", True)
    route_scale: float = option("factor on the routed experts' weights", 1.0, gt=0)
    groups: int | None = option("groups of experts; a token chooses groups first (null: no groups)", None, gt=0)
    groups_per_token: int | None = option("groups that each token may choose experts from", None, gt=0)
    router_bias_per_loop: int = option(
        "rows of a learned table added to the router's logits by loop step; later steps use the last; 0: none",
        0,
        ge=0,
        le=10_000,
    )
    balance_rate: float = option(
        "step of the balance bias after each optimizer step; 0: no bias", 0.001, ge=0, change="ask"
    )
    balance_loss: float = option("weight of the sequence-wise balance loss", 0.0, ge=0, change="ask")
    router_z_loss: float = option(
        "weight of the router's z-loss, the mean squared log-sum-exp of its logits", 0.0, ge=0, change="ask"
    )


@section
class Halting:
    """Adaptive computation time: every token weighs the states of its loop steps."""

    ponder_weight: float = option("weight of the ponder cost in the loss", 0.001, ge=0, change="ask")
    threshold: float = option("a token has halted when its halting probabilities sum to this", 0.99, gt=0, lt=1)


@section
class Looped:
    """Prelude blocks, a core that is run many times with the same weights, coda blocks, tied head."""

    kind: Literal["looped"] = option("looped: recurrent-depth transformer")
    vocabulary_size: int = option("number of token ids: rows of the token table and of each value table", gt=1)
    tokenizer_size: int | None = option(
        "number of ids of the tokenizer, where the tables have more rows: these are padding; null: no padding",
        None,
        gt=1,
    )
    width: int = option("channels of the residual stream", gt=0)
    prelude_layers: int = option("blocks before the loop", gt=0, le=10_000)
    core_layers: int = option("blocks inside the loop", gt=0, le=10_000)
    coda_layers: int = option("blocks after the loop", gt=0, le=10_000)
    attention: Attention = option("attention of every block")
    feed_forward: FeedForward = option("feed-forward layer of prelude and coda, and of the core unless it has experts")
    core_experts: MixtureOfExperts | None = option("experts of the core's blocks; null: dense core", None)
    injection: Literal["lti", "lti_exact", "linear", "additive"] = option(
        "how the input enters the state: lti (stable by construction), lti_exact (the same with the exact zero-order "
        "hold of arXiv 2312.00752), for comparison: linear (learned map), additive",
        "lti",
    )
    residual_scaling: Literal["none", "loops", "root_loops"] = option(
        "factor on what the core's layers add to the residual stream: 1, 1/N (arXiv 2606.18524) or 1/sqrt(N), where "
        "N is loop.mean_depth",
        "none",
    )
    initial_state: Literal["noise", "zero"] = option("the loop's first state: truncated normal noise, or zero", "noise")
    loop_embeddings: int = option(
        "rows of a table added to the state by loop step; later steps use the last; 0: none", 0, ge=0, le=10_000
    )
    adapter_rank: int = option("rank of the low-rank adapters of each core block, one per loop step; 0: none", 0, ge=0)
    adapter_loops: int = option(
        "loop steps with an adapter of their own; later steps use the last",
        1,
        gt=0,
        le=10_000,
        needs=Needs("model.adapter_rank"),
    )
    halting: Halting | None = option("adaptive computation time; null: the last state is the output", None)
    norm_epsilon: float = option("added to the mean square in RMSNorm", 1e-5, gt=0)


@section
class Dense:
    """The standard transformer, as the baseline of the looped one: the same blocks, each with its own weights."""

    kind: Literal["dense"] = option("dense: standard fixed-depth transformer")
    vocabulary_size: int = option("number of token ids: rows of the token table and of each value table", gt=1)
    tokenizer_size: int | None = option(
        "number of ids of the tokenizer, where the tables have more rows: these are padding; null: no padding",
        None,
        gt=1,
    )
    width: int = option("channels of the residual stream", gt=0)
    layers: int = option("number of blocks", gt=0, le=10_000)
    attention: Attention = option("attention of every block")
    feed_forward: FeedForward = option("feed-forward layer of every block")
    norm_epsilon: float = option("added to the mean square in RMSNorm", 1e-5, gt=0)


Model = Annotated[Looped | Dense, Field(discriminator="kind")]


def has_value_embedding(model: Looped | Dense, layer: int, layers: int) -> bool:
    """Whether this layer of the model (a core layer counts once) has a table: every second one, including the last."""
    attention = model.attention
    return isinstance(attention, GroupedQuery) and attention.value_embeddings and (layers - 1 - layer) % 2 == 0
