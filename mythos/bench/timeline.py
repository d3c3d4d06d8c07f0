"""Where the time of a training step goes: every moment belongs to exactly one part of the step.

A part's forward pass begins when its module is called; its backward pass begins when the gradient of its output is
complete. A collective counts as communication while the rank waits for it; what overlaps with computation does not
count. Time is that of the main stream on a GPU, measured by events, and that of the process on a CPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos.engine.engine import TrainingEngine
from mythos.model.loop import Loop
from mythos.model.transformer import TiedHead
from mythos.train.batch import StepBatches

COLLECTIVES = (
    "_allgather_base",
    "_end_coalescing",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_to_all_single",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
)
"""The methods of torch's process groups; each version of torch has some of them."""


class Part(Enum):
    """A part of a training step."""

    PRELUDE = "prelude"
    """Lookups and the blocks before the loop, forward and backward; all blocks of a dense model."""
    LOOP = "loop"
    CODA = "coda"
    """With the readout."""
    HEAD = "head"
    """With the loss."""
    OPTIMIZER = "optimizer"
    """With the gradient norm and clipping."""
    COMMUNICATION = "communication"
    """Waiting for collectives, and in them for slower ranks."""
    DATA = "data"
    """Waiting for the rows of the step, and of the next one."""
    OTHER = "other"
    """Metrics, balance of the experts, and what is between the passes."""


class Timeline:
    """Measures how long each part takes, from its construction on; it begins with OTHER."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entered = [(Part.OTHER, self._now())]

    @property
    def current(self) -> Part:
        """The part to which time belongs now."""
        return self._entered[-1][0]

    def enter(self, part: Part) -> None:
        """From now on time belongs to this part."""
        self._entered.append((part, self._now()))

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """The time of this block belongs to the part, unless it runs on a stream beside the main one."""
        if self._device.type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        before = self.current
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[Part, float]:
        """Seconds of each part so far; waits for the device."""
        self.enter(Part.OTHER)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(Part, 0.0)
        for (part, start), (_, end) in pairwise(self._entered):
            seconds[part] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment


class Observer:
    """Within ``with`` it reports the parts of the engine's steps to ``timeline``, which may be replaced."""

    def __init__(self, engine: TrainingEngine, batches: StepBatches) -> None:
        self._engine, self._batches = engine, batches
        self._undo = ExitStack()
        self.timeline = Timeline(engine.device)

    def __enter__(self) -> "Observer":
        self._observe_passes(self._engine.module)
        self._replace(self._engine, "backward", Part.OTHER)
        self._replace(self._engine, "step", Part.OPTIMIZER)
        self._replace(self._batches, "take", Part.DATA)
        self._replace(self._batches, "failed", Part.DATA)
        self._replace(dist.Work, "wait", Part.COMMUNICATION)
        for name in COLLECTIVES:
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name, Part.COMMUNICATION)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _observe_passes(self, model: nn.Module) -> None:
        loops = [module for module in model.modules() if isinstance(module, Loop)]
        self._at_start(model, Part.PRELUDE, Part.OTHER)
        self._at_end(model, Part.HEAD, Part.OTHER)
        for loop in loops:
            self._at_start(loop, Part.LOOP, Part.PRELUDE)
            self._at_end(loop, Part.LOOP, Part.CODA)
        for module in model.modules():
            if isinstance(module, TiedHead):
                self._at_start(module, Part.HEAD, Part.CODA if loops else Part.PRELUDE)

    def _at_start(self, module: nn.Module, part: Part, before: Part) -> None:
        """The module is ``part``; when the gradient of its input is complete, ``before`` begins."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.timeline.enter(part)
            self._at_gradient(inputs[0], before)

        self._undo.callback(module.register_forward_pre_hook(hook).remove)

    def _at_end(self, module: nn.Module, part: Part, following: Part) -> None:
        """After the module ``following`` begins; when its output's gradient is complete, ``part`` does."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            self.timeline.enter(following)
            self._at_gradient(outputs[0], part)

        self._undo.callback(module.register_forward_hook(hook).remove)

    def _at_gradient(self, tensor: Tensor, part: Part) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.timeline.enter(part))

    def _replace(self, owner: Any, name: str, part: Part) -> None:
        """Let the time of a method, of one object or of all objects of a class, belong to a part."""
        method: Callable[..., Any] = getattr(owner, name)
        before = vars(owner).get(name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.timeline.part(part):
                return method(*arguments, **options)

        setattr(owner, name, timed)
        if before is None:  # of the object's class
            self._undo.callback(delattr, owner, name)
        else:
            self._undo.callback(setattr, owner, name, before)
