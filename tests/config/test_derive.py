from pathlib import Path

import pytest

from mythos.config.derive import expert_parallel_size
from mythos.config.load import load
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("hosts", "size"),
    [
        ("a", 1),
        ("aa", 2),
        ("aaa", 1),  # 4 experts
        ("aaaaaaaa", 2),
        ("aaaabbbb", 2),
        ("aaaabb", 2),
        ("aaabbb", 1),
        ("abab", 1),  # consecutive ranks are on different hosts
    ],
)
def test_a_set_of_experts_stays_on_one_host(hosts: str, size: int) -> None:
    config = tiny_config("looped-moe", Path("data"), Path("run"))
    assert expert_parallel_size(config, list(hosts)) == size
    for first in range(0, len(hosts), size):
        assert len(set(hosts[first : first + size])) == 1


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("looped-moe-770m", 2),  # 6 layers x 64 experts x 3 x 304 x 1280 x 2 bytes: 0.8 GiB
        ("mythos-10b", 2),  # 6 x 128 x 3 x 896 x 4096 x 2: 15.75 GiB
        ("mythos-50b", 8),  # 8 x 256 x 3 x 1216 x 6144 x 2: 85.5 GiB, of which 8 ranks have 10.7 each
        ("mythos-1t", 8),  # none fits; the largest on a node
    ],
)
def test_a_set_of_experts_is_spread_no_further_than_its_memory_needs(model: str, size: int) -> None:
    config = load([CONFIGS / "model" / f"{model}.yaml", CONFIGS / "run" / "pretrain.yaml"], [], 16)
    assert expert_parallel_size(config, list("aaaaaaaabbbbbbbb")) == size


def test_a_size_that_is_given_is_taken_and_a_model_without_experts_has_1() -> None:
    given = tiny_config("looped-moe", Path("data"), Path("run"), ranks=4, parallel__expert_parallel_size=2)
    assert expert_parallel_size(given, list("aaaa")) == 2
    for model in ("looped", "dense"):
        assert expert_parallel_size(tiny_config(model, Path("data"), Path("run")), list("aaaa")) == 1
