"""loop.recompute: auto, on ranks of which one has little memory."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from tests.spawn import RankPool
from tests.tiny import tiny_config


def recomputes(config: Config, pages_of_last_rank: int | None) -> bool:
    real = os.sysconf

    def few_pages(name: str) -> int:
        return pages_of_last_rank if name == "SC_PHYS_PAGES" else real(name)

    with pytest.MonkeyPatch.context() as patch:
        if pages_of_last_rank and dist.get_rank() == dist.get_world_size() - 1:
            patch.setattr(os, "sysconf", few_pages)
        engine = TrainingEngine(config, torch.device("cpu"))
    recompute: bool = engine.module.loop.recompute
    return recompute


def test_all_ranks_do_what_the_one_with_the_least_memory_must(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config("looped-moe", tmp_path, tmp_path, ranks=2, loop__recompute="auto")
    assert two_ranks.run(recomputes, config, None) == [False, False]
    assert two_ranks.run(recomputes, config, 1000) == [True, True]
