"""What the plan says the ranks exchange, against the collectives that are called."""

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.config.derive import micro_steps
from mythos.config.schema import Config
from mythos.engine import engine as engine_module
from mythos.engine.engine import TrainingEngine
from mythos.engine.sections import deepspeed_config
from mythos.model.depth import plan
from mythos.plan.communication import Loops, collectives
from mythos.plan.gathers import DEEPSPEED, Limits
from mythos.plan.layout import layout_of
from mythos.plan.precision import element_bytes
from mythos.plan.schedule import schedule
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY, tiny_config

DEPTH, WITH_GRAD = 5, 2
NORM_BYTES = 8
"""Collectives of so few bytes are gradient norms."""
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}
Count = dict[tuple[str, int], list[int]]
"""(kind, ranks in the group) -> calls and bytes."""


class CountingMode(TorchDispatchMode):
    """Counts the collectives of more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Count = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            kind = KINDS[str(function).split(".")[1]]
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            group = next(g for g in map(unboxed, args) if g is not None)
            if group.size() > 1 and max(sizes) > NORM_BYTES:
                counted = self.counted[kind, group.size()]
                counted[0] += 1
                # Outputs come first; of an all-to-all the input counts, which is what this rank sends.
                counted[1] += sizes[1] if kind == "all_to_all" else max(sizes)
        return function(*args, **(kwargs or {}))


def unboxed(argument: Any) -> Any:
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None


def counted_in_third_step(config: Config, limits: Limits) -> Count:
    """The collectives of this rank."""
    of_deepspeed = {
        "stage3_prefetch_bucket_size": limits.prefetch,
        "stage3_max_live_parameters": limits.live,
        "stage3_max_reuse_distance": limits.reuse,
        "reduce_bucket_size": limits.reduce,
        "sub_group_size": limits.update,
    }

    def with_limits(*arguments: Any) -> dict[str, Any]:
        sections = deepspeed_config(*arguments)
        return sections | {"zero_optimization": sections["zero_optimization"] | of_deepspeed}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "deepspeed_config", with_limits)
        engine = TrainingEngine(config, torch.device("cpu"))
    ranks, own = dist.get_world_size(), config.train.micro_batch_sequences
    for mode in (nullcontext(), nullcontext(), CountingMode()):
        with mode:
            for _ in range(micro_steps(config, ranks)):
                tokens = torch.randint(VOCABULARY, (own, SEQUENCE_LENGTH))
                depths = plan(np.full(own * ranks, DEPTH), WITH_GRAD, slice(0, own), range(own))
                engine.backward(engine(tokens, tokens, depths if config.loop else None).total)
            engine.step(schedule(config.optim, 0, config.train.steps))
    assert isinstance(mode, CountingMode)
    return dict(mode.counted)


def check(config: Config, pool: RankPool, limits: Limits = DEEPSPEED) -> None:
    """Calls are those of every rank; bytes are summed over the ranks, which may send different numbers of tokens."""
    layout = layout_of(config, pool.ranks, pool.ranks)
    loops = Loops(DEPTH, WITH_GRAD, DEPTH, WITH_GRAD)
    planned = collectives(config, layout, element_bytes(config, on_gpu=False), loops, True, limits)
    expected: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])
    for each in planned:
        expected[each.kind, each.group.ranks][0] += each.calls
        expected[each.kind, each.group.ranks][1] += each.bytes * pool.ranks
    counted = pool.run(counted_in_third_step, config, limits)
    calls = {key: number for key, (number, _) in expected.items()}
    assert [{key: number for key, (number, _) in of_rank.items()} for of_rank in counted] == [calls] * pool.ranks
    total = {key: sum(of_rank[key][1] for of_rank in counted) for key in expected}
    assert total == {key: size for key, (_, size) in expected.items()}


TIGHT = Limits(prefetch=4000, live=8000, reuse=20_000, reduce=6000, update=20_000)
"""So that tiny models are gathered, reduced and updated in many parts, as large ones are by default."""


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_two_ranks_with_small_buckets(stage: int, size: int, two_ranks: RankPool, tmp_path: Path) -> None:
    check(config("looped-moe", tmp_path, 2, stage, size), two_ranks, TIGHT)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_four_ranks_with_muon(stage: int, size: int, four_ranks: RankPool, tmp_path: Path) -> None:
    check(config("mythos", tmp_path, 4, stage, size, optim__kind="muon"), four_ranks)


@pytest.mark.parametrize(("stage", "size"), [(3, 1), (3, 2), (2, 2)])
def test_two_ranks_in_bf16(stage: int, size: int, two_ranks: RankPool, tmp_path: Path) -> None:
    options = {"optim__kind": "muon", "precision": "bf16"}
    check(config("mythos", tmp_path, 2, stage, size, **options), two_ranks, TIGHT)


@pytest.mark.parametrize(("model", "stage"), [("dense", 0), ("looped", 1), ("published", 3)])
def test_models_without_experts(model: str, stage: int, two_ranks: RankPool, tmp_path: Path) -> None:
    check(config(model, tmp_path, 2, stage, optim__kind="muon"), two_ranks, TIGHT if stage else DEEPSPEED)


def config(model: str, path: Path, ranks: int, stage: int, size: int | None = None, **overrides: Any) -> Config:
    """Two micro-steps."""
    overrides = {"train__micro_batch_sequences": 4 // ranks, "parallel__zero_stage": stage} | overrides
    if size is not None:
        overrides["parallel__expert_parallel_size"] = size
    return tiny_config(model, path, path, ranks=ranks, **overrides)
