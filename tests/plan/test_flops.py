"""FLOPs: the arithmetic against torch's own counter of the products that a model carries out, and published numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mythos.config.load import load_model, merge
from mythos.config.loop_schema import Loop
from mythos.model import build_model
from mythos.model.depth import draw_depths, plan
from mythos.plan.flops import (
    LoopSteps,
    executed_steps,
    expected_steps,
    forward_flops,
    inference_flops,
    recomputation_flops,
    training_flops,
)
from mythos.plan.params import count_parameters
from tests.tiny import EXPERTS, LATENT, VOCABULARY, tiny_config

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
LENGTH = 24
NOT_COUNTED = {
    torch.ops.aten.addmm_: lambda _, left, right, **unused: 2 * left[0] * left[1] * right[1],
    torch.ops.aten._grouped_mm: lambda left, right, *unused, **options: 2 * left[0] * left[1] * right[-1],
}
"""Products that torch's counter leaves out."""
WIDE_VALUES = LATENT | {"value_head_size": 28}
"""Values smaller than queries would be padded for fused kernels, and the padding counted."""
DEPTHS = np.array([1, 2, 5])
"""Of three sequences: one is shallower than ``loop.backprop_depth``, one as deep, one deeper."""
ADAPTERS = {"model__adapter_rank": 4, "model__adapter_loops": 3, "model__loop_embeddings": 2}
OPTIONS = {
    "dense, grouped queries, squared ReLU": ("dense", {}),
    "looped": ("looped", {}),
    "newer options": ("newer", {}),
    "linear injection": ("looped", {"model__injection": "linear"}),
    "additive injection": ("looped", {"model__injection": "additive"}),
    "value embeddings": ("published", {}),
    "experts": ("looped-moe", {}),
    "latent attention": ("looped", {"model__attention": WIDE_VALUES}),
    "adapters": ("looped", ADAPTERS),
    "halting": ("looped", {"model__halting": {}}),
    "everything": ("mythos", {"model__core_experts": EXPERTS, "model__attention": WIDE_VALUES}),
}


class OneModule:
    """Counts everything as the whole model's."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *unused: object) -> None: ...


def counted(kind: str, overrides: dict, train: bool, recompute: bool = False) -> tuple[object, float]:
    """The configuration, and the FLOPs a token that torch counts when three sequences of different depths are run."""
    if kind != "dense":
        overrides = overrides | {"loop__recompute": recompute}
    config = tiny_config(kind, Path("data"), Path("run"), **overrides)
    model = build_model(config)
    tokens = torch.randint(VOCABULARY, (len(DEPTHS), LENGTH), generator=torch.Generator().manual_seed(0))
    depth = plan(DEPTHS, 2, slice(0, 3), range(3)) if config.loop else None
    # The plain form of attention, whose four products in the backward pass are those that the equations require.
    counter = FlopCounterMode(display=False, custom_mapping=NOT_COUNTED)
    counter.mod_tracker = OneModule()  # that of torch fails at inputs that are views of others, outside of autograd
    with (
        counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.set_grad_enabled(train),
    ):
        losses = model(tokens, tokens, depth)
        if train:
            losses.total.backward()
    return config, counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("name", OPTIONS)
def test_training_flops_are_those_that_torch_counts(name: str) -> None:
    config, flops = counted(*OPTIONS[name], train=True)
    steps = executed_steps(DEPTHS, config.loop)
    assert training_flops(config.model, LENGTH, steps) == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("name", OPTIONS)
def test_inference_flops_are_those_that_torch_counts(name: str) -> None:
    config, flops = counted(*OPTIONS[name], train=False)
    depth = DEPTHS.mean() if config.loop else 0.0
    assert inference_flops(config.model, LENGTH, depth) == pytest.approx(flops, rel=0.01)


def test_recomputation_is_a_forward_pass_of_each_step_with_gradient() -> None:
    """Less the last product of the step, of which torch knows that the backward pass does not need the result."""
    config, with_recomputation = counted("looped", {}, train=True, recompute=True)
    _, without = counted("looped", {}, train=True)
    steps = executed_steps(DEPTHS, config.loop)
    last = 2 * config.model.width * config.model.feed_forward.hidden_size * steps.with_grad
    extra = recomputation_flops(config.model, LENGTH, steps)
    assert extra - last == pytest.approx(with_recomputation - without, rel=0.01)


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("transformer-770m", 2.94), ("looped-770m", 6.89), ("transformer-1.3b", 5.29), ("looped-1.3b", 12.57)],
)
def test_the_published_models_cost_what_was_published(name: str, gigaflops: float) -> None:
    file = CONFIGS / f"{name}.yaml"
    model, options = load_model([file]), merge([file], ()).get("loop")
    loop = Loop(**options) if options else None
    assert training_flops(model, 2048, expected_steps(loop)) == pytest.approx(gigaflops * 1e9, rel=0.03)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "standard", "length"),
    [
        ("looped-middle-770m", "transformer-770m", 2048),
        ("looped-middle-1.3b", "transformer-1.3b", 2048),
        ("looped-middle-proxy", "proxy-transformer", 256),
    ],
)
def test_the_middle_half_runs_twice_at_the_size_and_cost_of_a_standard_model(
    name: str, standard: str, length: int, causal: bool
) -> None:
    file = CONFIGS / f"{name}.yaml"
    model, loop, other = (
        load_model([file]),
        Loop(**merge([file], ())["loop"]),
        load_model([CONFIGS / f"{standard}.yaml"]),
    )
    steps = expected_steps(loop)
    assert (steps.without_grad, steps.with_grad) == (0, 2)
    assert model.prelude_layers == model.coda_layers == model.core_layers / 2
    assert model.prelude_layers + 2 * model.core_layers + model.coda_layers == other.layers
    assert (model.width, model.attention) == (other.width, other.attention)
    assert count_parameters(model).total == pytest.approx(count_parameters(other).total, rel=2e-3)
    cost = training_flops(other, length, causal=causal)
    assert training_flops(model, length, steps, causal) == pytest.approx(cost, rel=2e-3)


def test_causal_attention_has_on_average_half_the_keys() -> None:
    model = load_model([CONFIGS / "transformer-1.3b.yaml"])
    assert training_flops(model, 2048, causal=True) == pytest.approx(4.83e9, rel=0.01)
    full, causal = (forward_flops(model, 2048, kind) for kind in (False, True))
    pairs = sum(query + 1 for query in range(2048)) / 2048
    assert full.total(0) - causal.total(0) == pytest.approx(4 * (2048 - pairs) * model.width * model.layers)


@pytest.mark.parametrize(
    "kind", ["fixed", "poisson_per_batch", "poisson_per_sequence", "log_normal_poisson_per_sequence"]
)
def test_the_expected_steps_are_the_mean_of_those_drawn(kind: str) -> None:
    loop = Loop(mean_depth=5.0, depth=kind, backprop_depth=4)
    batch = 1 if kind == "poisson_per_batch" else 5000
    depths = np.concatenate([draw_depths(loop, 0, 1, range(first, first + batch)) for first in range(0, 5000, batch)])
    drawn, expected = executed_steps(depths, loop), expected_steps(loop)
    assert expected.with_grad == pytest.approx(drawn.with_grad, abs=0.05)
    assert expected.without_grad == pytest.approx(drawn.without_grad, abs=0.1)


def test_a_curriculum_begins_with_one_step() -> None:
    loop = Loop(mean_depth=5.0, depth="fixed", backprop_depth=4)
    assert expected_steps(loop, mean=1.0) == LoopSteps(0.0, 1.0)
    assert expected_steps(loop) == LoopSteps(1.0, 4.0)
