"""Compiled blocks against the same blocks as written."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from mythos.model import build_model
from mythos.model.compilation import compile_blocks
from mythos.model.depth import DepthPlan, plan
from mythos.model.loop import Loop
from tests.model.helpers import gradients, numbers, randomise
from tests.require import require
from tests.tiny import VOCABULARY, tiny_config

FP32, BF16 = torch.float32, torch.bfloat16
TOKENS = torch.randint(VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def depth_plan(depths: list[int]) -> DepthPlan:
    return plan(np.array(depths), 2, slice(0, len(depths)), range(len(depths)))


def losses_and_gradients(model: nn.Module, depths: list[int]) -> list[torch.Tensor]:
    rows = TOKENS[: len(depths)]
    total = model(rows[:, :-1], rows[:, 1:], depth_plan(depths)).total
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


@pytest.mark.parametrize(("kind", "dtype"), [("published", FP32), ("mythos", BF16), ("newer", FP32)])
def test_nothing_is_compiled_again_when_depths_and_the_sequences_due_change(kind: str, dtype: torch.dtype) -> None:
    model = randomise(build_model(tiny_config(kind, "data", "run")), deviation=0.1)
    model.product_type = dtype
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, backend="aot_eager")
    for number, depths in enumerate([[3, 2, 4], [1], [5, 1, 2, 9, 3], [7, 1], [1, 1, 1, 1], [2, 3, 9, 9, 9]]):
        for own, expected in zip(
            losses_and_gradients(compiled, depths), losses_and_gradients(model, depths), strict=True
        ):
            assert_close(own, expected, rtol=1e-4, atol=1e-6)
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


def test_compiled_code_gives_the_same_states_and_gradients() -> None:
    require("g++")
    config = tiny_config("looped", "data", "run", model__core_layers=1, loop__recompute=False)
    loop = randomise(Loop(config.model, config.loop), deviation=0.1)
    compiled = copy.deepcopy(loop)
    compile_blocks(compiled)
    for depths in ([2, 2, 1], [1]):  # all with gradient, for the sake of time
        e = numbers(len(depths), 7, config.model.width)
        outcomes = []
        for module in (compiled, loop):
            h, *_ = module(e, [None], module.core[0].attention.rotary(7, e.device), depth_plan(depths))
            outcomes.append([h, *gradients(h, e, *module.parameters())])
        for own, expected in zip(*outcomes, strict=True):
            assert_close(own, expected, rtol=1e-4, atol=1e-6)
