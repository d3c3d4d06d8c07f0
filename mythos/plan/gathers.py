"""Which parameters ZeRO-3 gathers together, and when: DeepSpeed's coordinator, followed step by step.

Every call of a module fetches the parameters of its own that are not there, then prefetches those of the next modules,
in the order of the micro-step before, up to a bucket's size. A parameter that is not used again soon is released
(deepspeed/runtime/zero/partitioned_param_coordinator.py, version 0.19). The loop is one module, and so is every other
block.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from mythos.config.model_schema import Dense, Looped
from mythos.plan.layout import Held, Layout, held_by_rank
from mythos.plan.tensors import Treatment

BLOCKS = ("prelude", "coda", "blocks")
LISTS = (*BLOCKS, "value_embeddings.tables")
"""Containers, which are not called themselves."""


@dataclass(frozen=True)
class Limits:
    """Elements; by default those of DeepSpeed."""

    prefetch: int = 50_000_000
    """What is prefetched together (``stage3_prefetch_bucket_size``)."""
    live: int = 1_000_000_000
    """What is gathered at a time (``stage3_max_live_parameters``)."""
    reuse: int = 1_000_000_000
    """A parameter that is used again within so many is kept (``stage3_max_reuse_distance``)."""
    reduce: int = 500_000_000
    """What is reduced together (``reduce_bucket_size``)."""
    update: int = 1_000_000_000
    """What a rank updates at a time under ZeRO 3 (``sub_group_size``)."""


DEEPSPEED = Limits()


@dataclass
class Module:
    """A module that is called: its own parameters, and the modules in it in the order of their calls."""

    parameters: list[Held] = field(default_factory=list)
    children: dict[str, "Module"] = field(default_factory=dict)
    backward_calls: int = 1
    """Tensors with gradient among its outputs: each starts its backward hook."""
    is_leaf: bool = False
    """Its parameters are those of all modules in it, which have no hooks of their own."""

    def all_parameters(self) -> Iterator[Held]:
        """Its parameters and those of the modules in it."""
        yield from self.parameters
        for child in self.children.values():
            yield from child.all_parameters()


@dataclass(frozen=True)
class Gathers:
    """What one micro-step gathers."""

    waited: list[list[Held]]
    """The parameters of each fetch, of all process groups: a module waits for them."""
    prefetched: list[list[Held]]
    """Those of each prefetch, while modules compute."""
    peak_elements: int
    """The most elements that are gathered at a time."""


def leaf_of(parameter: str) -> str | None:
    """The name of the leaf that a parameter belongs to, or None: the loop and the blocks outside of it are leaves."""
    first, second, *_ = parameter.split(".")
    return first if first == "loop" else f"{first}.{second}" if first in BLOCKS else None


def module_tree(parameters: Sequence[Held]) -> Module:
    """The modules of the model as ZeRO-3 sees them."""
    root = Module()
    tied = None
    for parameter in parameters:
        path = parameter.name.split(".")[:-1]
        tied = tied or parameter  # the token table is the first parameter, and the head's weight as well
        module, name = root, ""
        for part in path:
            name = f"{name}.{part}" if name else part
            if name in LISTS:
                continue
            if name not in module.children:
                module.children[name] = Module([tied] if name == "head" else [])
            module = module.children[name]
            module.is_leaf = name == leaf_of(parameter.name)
            if module.is_leaf:
                break
        module.parameters.append(parameter)
        if name == "embedding":
            root.children["value_embeddings"] = Module()
    tables = root.children["value_embeddings"]
    tables.backward_calls = len(tables.children)
    for name, child in root.children.items():
        if child.is_leaf:
            child.parameters.sort(key=_created)
        if name == "loop":
            child.backward_calls = 2  # the state and the penalties
    return root


def _created(parameter: Held) -> tuple[bool, float, bool]:
    """Sorts a leaf's parameters as they were created: experts and routers by AutoEP, a block's feed-forward first."""
    by_autoep = parameter.treatment in (Treatment.EXPERT, Treatment.ROUTER)
    part, where, number, *_ = parameter.name.split(".")
    block = {"core": int(number) if where == "core" else 0, "injection": -1}.get(where, math.inf)
    first = ".feed_forward." in parameter.name or parameter.name.endswith("input.weight")
    return by_autoep, 0 if by_autoep or part != "loop" else block, not first


@cache
def micro_step(model: Looped | Dense, layout: Layout, kept: int, limits: Limits = DEEPSPEED) -> Gathers:
    """The gathers of one micro-step, once DeepSpeed knows the order of the modules (from the third one on).

    Args:
        kept: parameters with at most so many elements are never released, ``parallel.persistent_parameter_elements``.
    """
    root = module_tree(held_by_rank(model, layout))
    events = [*_forward(root), *_backward(root)]
    return _Coordinator([module for fetch, module in events if fetch], kept, limits).run(events)


Event = tuple[bool, Module]
"""Whether the module is entered, or left."""


def _forward(module: Module) -> Iterator[Event]:
    yield True, module
    for child in module.children.values():
        yield from _forward(child)
    yield False, module


def _backward(module: Module) -> Iterator[Event]:
    yield from [(True, module)] * module.backward_calls
    for child in reversed(module.children.values()):
        yield from _backward(child)
    yield False, module


class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator with a complete trace."""

    def __init__(self, order: list[Module], kept: int, limits: Limits) -> None:
        self._order, self._limits = order, limits
        self._step, self._elements, self._peak = 0, 0, 0
        uses = [(parameter, step) for step, module in enumerate(order) for parameter in module.parameters]
        self._kept = {parameter.name for parameter, _ in uses if parameter.size <= kept}
        self._queue = deque(uses)
        self._fetched_for: dict[str, int] = {}
        self._present: set[str] = set(self._kept)
        self._waited: list[list[Held]] = []
        self._prefetched: list[list[Held]] = []

    def run(self, events: Sequence[Event]) -> Gathers:
        """Follow the calls."""
        for is_entered, module in events:
            if is_entered:
                self._enter(module)
            else:
                self._leave(module)
        return Gathers(self._waited, self._prefetched, self._peak)

    def _enter(self, module: Module) -> None:
        self._gather(module.parameters, self._waited)
        new = {p.name for p in module.parameters if self._fetched_for.get(p.name, -1) < self._step}
        for _ in new:
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter.name] = step
        room = min(self._limits.live - self._elements, self._limits.prefetch)
        wanted: dict[str, Held] = {}
        elements = 0
        while self._queue and elements < room:
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter.name] = max(self._fetched_for.get(parameter.name, -1), step)
            if parameter.name not in self._present and parameter.name not in wanted:
                wanted[parameter.name] = parameter
                elements += parameter.size
        self._gather(list(wanted.values()), self._prefetched)
        self._step += 1

    def _gather(self, parameters: Sequence[Held], calls: list[list[Held]]) -> None:
        missing = [parameter for parameter in parameters if parameter.name not in self._present]
        if missing:
            calls.append(missing)
            self._present |= {parameter.name for parameter in missing}
            self._elements += sum(parameter.size for parameter in missing)
            self._peak = max(self._peak, self._elements)

    def _leave(self, module: Module) -> None:
        candidates = {
            parameter.name: parameter
            for parameter in module.parameters
            if parameter.name not in self._kept and self._fetched_for.get(parameter.name, -1) <= self._step
        }
        passed = 0
        for later in self._order[self._step :] if candidates else ():
            if passed >= self._limits.reuse:
                break
            # DeepSpeed looks into the later modules only where a leaf is left.
            parameters = later.all_parameters() if module.is_leaf else () if later.is_leaf else later.parameters
            for parameter in parameters:
                candidates.pop(parameter.name, None)
                passed += parameter.size
        for name, parameter in candidates.items():
            if name in self._present:
                self._present.remove(name)
                self._elements -= parameter.size
