"""How a run starts: initial weights on the device, and the memory allocator."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mythos.config.init_schema import Init
from mythos.model.init import initial_draws
from mythos.model.rules import Start

Record = Callable[[str, float, str], None]
SHAPES = {"cpu": (4, 96, 64), "cuda": (32, 2432, 6144)}
"""Of a stack of matrices; on a GPU an eighth of the experts of a layer of mythos-50b."""
RANKS, LIMIT_S = 16, 300


def drawn(device: torch.device) -> tuple[float, bool, float]:
    """The largest error of orthogonality, whether a second draw is the same, and the parameters drawn in a second."""
    width = SHAPES[device.type][-1]
    layer = nn.ParameterDict({"experts": torch.empty(SHAPES[device.type], device="meta")})
    ((parameter, draw),) = initial_draws(layer, Start(Init(), width), seed=1).items()
    draw(parameter[:1].shape, device)  # loads the library
    begun = time.perf_counter()
    found = draw(parameter.shape, device)
    first = found[0, 0, 0].item()  # waits for the device
    seconds = time.perf_counter() - begun
    same = torch.equal(found, draw(parameter.shape, device)) and first != 0
    error = 0.0
    for matrix in found[:2]:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
        gram = (tall.mT @ tall).double()
        error = max(error, (gram / gram.diagonal().mean() - torch.eye(len(gram), device=device)).abs().max().item())
    return error, same, parameter.numel() / seconds


def test_initial_weights(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    error, same, rate = here(drawn)
    seconds = 50e9 / RANKS / rate
    record("error of orthogonality", error, "<= 1e-3")
    record(f"seconds for 50B parameters on {RANKS} GPUs", seconds, f"<= {LIMIT_S}, half of the watchdog's limit")
    assert error <= 1e-3
    assert same
    if device.type == "cuda":
        assert seconds <= LIMIT_S


def segments_grow(device: torch.device) -> bool:
    """Whether the allocator has read its setting."""
    torch.zeros(1, device=device)
    return bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])


@pytest.mark.gpu
def test_the_allocator_grows_its_segments(here: Callable[..., Any]) -> None:
    assert here(segments_grow)
