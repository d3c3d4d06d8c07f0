"""Repeatability, bad steps, ZeRO stages, Muon, and how often the host waits for the GPU."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from tests.gpu.training import config_for, largest_difference, losses, train

Record = Callable[[str, float, str], None]
MUON = {"optim": {"kind": "muon", "learning_rate": 3e-3, "muon_learning_rate": 3e-3}}


def repeated(device: torch.device, config: Config, steps: int) -> float:
    """The largest difference of the losses of two runs that should be the same."""
    return largest_difference(losses(device, config, steps), losses(device, config, steps))


def test_the_same_run_twice(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    steps = {"cpu": 3, "cuda": 20}[device.type]
    config = config_for(device, "mythos", precision="bf16", train__steps=steps)
    difference = here(repeated, config, steps)
    record("largest difference of the losses", difference, "printed")
    if device.type == "cpu":
        assert difference == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zero_stages_agree(optimizer: str, device: torch.device, here: Callable[..., Any], record: Record) -> None:
    steps = {"cpu": 3, "cuda": 20}[device.type]
    options = MUON if optimizer == "muon" else {}
    curves = [
        here(losses, config_for(device, "looped-moe", parallel__zero_stage=stage, train__steps=steps, **options), steps)
        for stage in (2, 3)
    ]
    difference = largest_difference(*curves)
    record(f"{optimizer}, stage 2 against 3", difference, "<= 1e-3")
    assert curves[0][-1] < curves[0][0]
    assert difference <= 1e-3


def weights(engine: TrainingEngine) -> dict[str, Tensor]:
    """A copy of the fp32 weights of every parameter; one rank has all of each."""
    return {shard.name: shard.weights(shard.start, shard.stop).clone() for shard in engine.shards()}


def bad_step(device: torch.device, config: Config) -> tuple[list[bool], float]:
    """Whether each of three steps was applied, where the second has a loss of NaN; the change of weights in it."""
    engine = TrainingEngine(config, device)
    applied = [train(engine, config, 1)[0].applied]
    before = weights(engine)
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * torch.nan)  # type: ignore[method-assign]
    applied.append(train(engine, config, 1, 1)[0].applied)
    engine.backward = backward  # type: ignore[method-assign]
    change = max((after - before[name]).abs().max().item() for name, after in weights(engine).items())
    return [*applied, train(engine, config, 1, 2)[0].applied], change


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_is_skipped(
    stage: int, device: torch.device, here: Callable[..., Any], record: Record
) -> None:
    applied, change = here(bad_step, config_for(device, "looped-moe", precision="bf16", parallel__zero_stage=stage))
    record(f"change of weights, stage {stage}", change, "0")
    assert applied == [True, False, True]
    assert change == 0


def host_waits(device: torch.device, config: Config, steps: int) -> dict[str, float]:
    """How often the host waited for the GPU in a step, by the file that made it wait; after a step of warm-up."""
    engine = TrainingEngine(config, device)
    train(engine, config, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train(engine, config, steps, 1)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found: dict[str, float] = {}
    for each in caught:
        if "synchronizing" in str(each.message):
            found[each.filename] = found.get(each.filename, 0.0) + 1 / steps
    return found


@pytest.mark.parametrize("model", ["published", "looped-moe"])
def test_the_host_seldom_waits(model: str, here: Callable[..., Any], device: torch.device, record: Record) -> None:
    options = {"loop__mean_depth": 8, "loop__backprop_depth": 4, "precision": "bf16"}
    found = here(host_waits, config_for(device, model, **options), 5)
    by_others = {name: count for name, count in found.items() if "auto_ep" not in name and "/moe/" not in name}
    total = sum(by_others.values())
    where = ", ".join(f"{name.rsplit('/', 1)[-1]} {count:.1f}" for name, count in sorted(by_others.items()))
    record(f"{model}, a micro-step and its update ({where})", total, "<= 10 without AutoEP's own")
    record(f"{model}, AutoEP's own", sum(found.values()) - total, "printed")
    assert total <= 10
