from pathlib import Path

import pytest

from mythos.config.derive import expert_parallel_size
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("hosts", "size"),
    [
        ("a", 1),
        ("aa", 2),
        ("aaa", 1),  # 4 experts
        ("aaaaaaaa", 4),
        ("aaaabbbb", 4),
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


def test_a_size_that_is_given_is_taken_and_a_model_without_experts_has_1() -> None:
    given = tiny_config("looped-moe", Path("data"), Path("run"), ranks=4, parallel__expert_parallel_size=2)
    assert expert_parallel_size(given, list("aaaa")) == 2
    for model in ("looped", "dense"):
        assert expert_parallel_size(tiny_config(model, Path("data"), Path("run")), list("aaaa")) == 1
