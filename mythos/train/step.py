"""One optimizer step, and the exchange between the ranks that follows it."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mythos.config.model_schema import Dense, Looped
from mythos.engine.engine import TrainingEngine
from mythos.loss import Losses, Mean
from mythos.model.moe import balance, expert_load, moe_layers
from mythos.ranks import group
from mythos.train.batch import StepBatch, StepBatches, micro_batch

GIB = 2**30


@dataclass(frozen=True)
class StepResult:
    """What one rank knows after its part of a step; ``applied`` and ``gradient_norm`` are the same on every rank."""

    measured: dict[str, Mean]
    """The cross-entropy, each penalty and the model's diagnostics, joined over this rank's micro batches, by metric.

    On the device: nothing waits for it before the exchange.
    """
    load_LE: Tensor | None
    """Tokens that this rank sent to each expert of each layer; None without experts."""
    applied: bool
    """Whether the weights were updated: the gradient norm was finite."""
    gradient_norm: float
    text_tokens: int | None
    """See ``StepBatch``; None on all ranks or on none."""


@dataclass(frozen=True)
class StepVotes:
    """The values of a step after the exchange: the same on every rank, so that all take the same decisions."""

    loss: float
    """The cross-entropy of the global batch."""
    measured: dict[str, float]
    """The loss, each penalty and the model's diagnostics, by metric, without what no rank had to measure."""
    load_LE: Tensor | None
    """Tokens of each expert of each layer over all ranks, fp32 on the CPU."""
    stop: bool
    """A rank has received a stop request."""
    data_failed: bool
    """A rank cannot read its rows of the next step."""
    saving: bool
    """A rank is still writing its part of a checkpoint."""
    data_wait_seconds: float
    """Of the rank that waited longest."""
    peak_memory_gib: float
    """Of the rank that used most."""
    text_tokens: int | None
    """Targets of the global batch that are text; None if the data does not say which ids are."""


def train_step(engine: TrainingEngine, batch: StepBatch, groups: Mapping[str, Mapping[str, float]]) -> StepResult:
    """Forward and backward pass of every micro batch, then one update of the weights. Collective."""
    measured: list[Mapping[str, Mean]] = []
    load_LE = None
    for rows, plan in zip(batch.rows, batch.plans, strict=True):
        own = micro_batch(rows, batch.answers, engine.device)
        losses: Losses = engine(own.tokens, own.targets, plan, count=own.divisor)
        if moe_layers(engine.module):  # before the backward pass, whose recomputation would count the tokens again
            load_LE = expert_load(engine.module) + (0 if load_LE is None else load_LE)
        engine.backward(losses.total)
        loss = Mean(losses.cross_entropy * own.divisor, own.counted) if own.divisor else Mean(losses.cross_entropy)
        measured.append({"train/loss": loss, **losses.measured})
    update = engine.step(groups)
    return StepResult(_join(measured), load_LE, update.applied, update.gradient_norm, batch.text_tokens)


class MayStop(Protocol):
    """A ``StopRequest``, or what stands for one where no signal is awaited."""

    @property
    def asked(self) -> bool: ...


class MaySave(Protocol):
    """A ``Saver``, or what stands for one where nothing is saved."""

    @property
    def pending(self) -> bool: ...


def exchange(
    result: StepResult, stop: MayStop, batches: StepBatches, saver: MaySave, device: torch.device
) -> StepVotes:
    """Exchange the values that only one rank knows, in one collective.

    Waits for this rank's rows of the next step: if one rank cannot read them, all ranks must know.
    """
    data_failed = batches.failed()
    means = result.measured.values()
    totals = [torch.as_tensor(mean.total, dtype=torch.float64).to(device, non_blocking=True) for mean in means]
    sums = [*(mean.weight for mean in means), float(result.text_tokens or 0)]
    largest = [
        float(stop.asked),
        float(data_failed),
        float(saver.pending),
        batches.waited_seconds,
        _peak_memory_gib(device),
    ]
    on_device = torch.tensor([*sums, *largest], dtype=torch.float64).to(device, non_blocking=True)
    numbers = torch.cat((torch.stack(totals), on_device))
    load_LE = result.load_LE
    own = numbers if load_LE is None else torch.cat((numbers, load_LE.double().flatten()))
    rows = group.gather(own)
    summed = len(totals) + len(sums)
    *joined, text_tokens = rows[:, :summed].sum(dim=0).tolist()
    pairs = zip(joined[: len(totals)], joined[len(totals) :], strict=True)
    measured = {name: total / weight for name, (total, weight) in zip(result.measured, pairs, strict=True) if weight}
    stop_asked, failed, saving, waited, memory = rows[:, summed : len(numbers)].amax(dim=0).tolist()
    total = None if load_LE is None else rows[:, len(numbers) :].sum(dim=0).float().view(load_LE.shape)
    return StepVotes(
        loss=measured["train/loss"],
        measured=measured,
        load_LE=total,
        stop=bool(stop_asked),
        data_failed=bool(failed),
        saving=bool(saving),
        data_wait_seconds=waited,
        peak_memory_gib=memory,
        text_tokens=None if result.text_tokens is None else int(text_tokens),
    )


def balance_experts(engine: TrainingEngine, model: Looped | Dense, result: StepResult, votes: StepVotes) -> None:
    """Update the experts' balance biases from the load of an applied step, equally on every rank."""
    if isinstance(model, Looped) and model.core_experts and votes.load_LE is not None and result.applied:
        balance(engine.module, votes.load_LE.to(engine.device), model.core_experts.balance_rate)


def _join(parts: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
    """The means over several micro batches; totals are added in fp64."""
    return {
        name: Mean(sum(_double(part[name].total) for part in parts), sum(part[name].weight for part in parts))
        for name in parts[0]
    }


def _double(total: Tensor | float) -> Tensor | float:
    return total.double() if isinstance(total, Tensor) else total


def _peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this rank so far: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
