"""The parameters of a model, one by one: their names, shapes and treatment, without building it.

Names and order are those of ``model.named_parameters()``; the tied output matrix is the token table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property

from mythos.config.model_schema import (
    VALUE_GATE_CHANNELS,
    Dense,
    FeedForward,
    GroupedQuery,
    Latent,
    Looped,
    MixtureOfExperts,
    has_value_embedding,
)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Treatment(Enum):
    """What the optimizer and ZeRO make of a parameter."""

    MATRIX = auto()
    """Of a block, with at least two dimensions: Muon's, or AdamW's with weight decay."""
    ROUTER = auto()
    EXPERT = auto()
    OUTER_MATRIX = auto()
    """Of the injection, the readout and halting: AdamW's, with weight decay where AdamW has all matrices."""
    OTHER = auto()
    """Tables, norms, vectors."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, with the experts of all ranks."""

    name: str
    shape: Shape
    part: str
    """The part of the model to which ``mythos params`` counts it."""
    treatment: Treatment
    stacked: int = 1
    """Matrices that it stacks along its rows, where that is more than one."""

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameters(model: Looped | Dense) -> list[Parameter]:
    """Every parameter of the model."""
    return list(_parameters(model))


def _parameters(model: Looped | Dense) -> Iterator[Parameter]:
    width, vocabulary = model.width, model.vocabulary_size
    before_core = model.layers if isinstance(model, Dense) else model.prelude_layers
    before_coda = before_core + (model.core_layers if isinstance(model, Looped) else 0)
    layers = before_coda + (model.coda_layers if isinstance(model, Looped) else 0)
    yield Parameter("embedding.weight", (vocabulary, width), "token table", Treatment.OTHER)
    if isinstance(model.attention, GroupedQuery):
        row = model.attention.kv_heads * model.attention.head_size
        for layer in range(layers):
            if has_value_embedding(model, layer, layers):
                name = f"value_embeddings.tables.{layer}.weight"
                yield Parameter(name, (vocabulary, row), "value tables", Treatment.OTHER)
    for layer in range(before_core):
        place = f"blocks.{layer}" if isinstance(model, Dense) else f"prelude.{layer}"
        yield from _block(model, place, has_value_embedding(model, layer, layers))
    if isinstance(model, Looped):
        yield Parameter("prelude_norm.weight", (width,), "norms", Treatment.OTHER)
        yield from _loop(model, layers)
        yield Parameter("readout.weight", (width, width), "readout C", Treatment.OUTER_MATRIX)
        for layer in range(before_coda, layers):
            yield from _block(model, f"coda.{layer - before_coda}", has_value_embedding(model, layer, layers))
    yield Parameter("head.norm.weight", (width,), "norms", Treatment.OTHER)


def _loop(model: Looped, layers: int) -> Iterator[Parameter]:
    width = model.width
    lti: Shapes = {"log_decay": (width,), "step_bias": (width,), "input.weight": (width, width)}
    injection: dict[str, Shapes] = {
        "lti": lti,
        "lti_exact": lti,
        "linear": {"state.weight": (width, width), "input.weight": (width, width)},
        "additive": {},
    }
    for name, shape in injection[model.injection].items():
        treatment = Treatment.OUTER_MATRIX if len(shape) > 1 else Treatment.OTHER
        yield Parameter(f"loop.injection.{name}", shape, "injection", treatment)
    for layer in range(model.core_layers):
        place = f"loop.core.{layer}"
        gate = has_value_embedding(model, model.prelude_layers + layer, layers)
        yield from _block(model, place, gate, model.core_experts)
        if model.adapter_rank:
            for name, shape in (("down", (model.adapter_rank, width)), ("up", (width, model.adapter_rank))):
                pair = (model.adapter_loops, *shape)
                yield Parameter(f"{place}.adapter.{name}", pair, "adapters", Treatment.MATRIX)
        if model.core_experts and model.core_experts.router_bias_per_loop:
            table = (model.core_experts.router_bias_per_loop, model.core_experts.experts)
            yield Parameter(f"{place}.router_bias.weight", table, "router biases", Treatment.OTHER)
    if model.loop_embeddings:
        table = (model.loop_embeddings, width)
        yield Parameter("loop.step_embedding.weight", table, "loop embeddings", Treatment.OTHER)
    if model.halting:
        yield Parameter("loop.halting.gate.weight", (1, width), "halting", Treatment.OUTER_MATRIX)
        yield Parameter("loop.halting.gate.bias", (1,), "halting", Treatment.OTHER)


def _block(
    model: Looped | Dense, place: str, value_gate: bool, experts: MixtureOfExperts | None = None
) -> Iterator[Parameter]:
    width = model.width
    yield Parameter(f"{place}.attention_norm.weight", (width,), "norms", Treatment.OTHER)
    for name, shape in attention_shapes(width, model.attention, value_gate).items():
        treatment = Treatment.MATRIX if len(shape) > 1 else Treatment.OTHER
        part = "value gates" if name == "value_gate.weight" else "attention"
        stacked = 2 if name == "key_value.weight" else 1
        yield Parameter(f"{place}.attention.{name}", shape, part, treatment, stacked)
    yield Parameter(f"{place}.feed_forward_norm.weight", (width,), "norms", Treatment.OTHER)
    place = f"{place}.feed_forward"
    if experts is None:
        yield from _feed_forward(place, feed_forward_shapes(width, model.feed_forward), "feed-forward")
        return
    yield Parameter(f"{place}.router.weight", (experts.experts, width), "routers", Treatment.ROUTER)
    for name, shape in swiglu_shapes(width, experts.expert_hidden_size).items():
        of_all = (experts.experts, *shape)
        name, stacked = {"gate_up.weight": ("gate_up_proj", 2), "down.weight": ("down_proj", 1)}[name]
        yield Parameter(f"{place}.experts.{name}", of_all, "routed experts", Treatment.EXPERT, stacked)
    shared = swiglu_shapes(width, experts.shared_hidden_size)
    yield from _feed_forward(f"{place}.shared_experts", shared, "shared experts")


def _feed_forward(place: str, shapes: Shapes, part: str) -> Iterator[Parameter]:
    for name, shape in shapes.items():
        yield Parameter(f"{place}.{name}", shape, part, Treatment.MATRIX, 2 if name == "gate_up.weight" else 1)


def attention_shapes(width: int, attention: GroupedQuery | Latent, value_gate: bool = False) -> Shapes:
    """The parameters of one attention layer."""
    match attention:
        case GroupedQuery():
            heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_size
            gate: Shapes = {"value_gate.weight": (kv_heads, VALUE_GATE_CHANNELS)} if value_gate else {}
            return {
                "query.weight": (heads * size, width),
                "key_value.weight": (2 * kv_heads * size, width),
                **gate,
                "out.weight": (width, heads * size),
            }
        case Latent():
            query, latent, heads = attention.query_latent_size, attention.key_value_latent_size, attention.heads
            content, rotated, value = (
                attention.content_head_size,
                attention.rotary_head_size,
                attention.value_head_size,
            )
            return {
                "query_down.weight": (query, width),
                "query_norm.weight": (query,),
                "query_up.weight": (heads * (content + rotated), query),
                "key_value_down.weight": (latent + rotated, width),
                "key_value_norm.weight": (latent,),
                "key_value_up.weight": (heads * (content + value), latent),
                "out.weight": (width, heads * value),
            }


def swiglu_shapes(width: int, hidden_size: int) -> Shapes:
    """The parameters of one gated feed-forward layer or expert."""
    return {"gate_up.weight": (2 * hidden_size, width), "down.weight": (width, hidden_size)}


def feed_forward_shapes(width: int, config: FeedForward) -> Shapes:
    """The parameters of one dense feed-forward layer."""
    if config.kind == "swiglu":
        return swiglu_shapes(width, config.hidden_size)
    return {"up.weight": (config.hidden_size, width), "down.weight": (width, config.hidden_size)}


def matrix_elements(shapes: Shapes) -> int:
    """Elements of all matrices among the parameters of a layer."""
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
