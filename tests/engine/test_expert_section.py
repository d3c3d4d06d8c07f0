"""AutoEP's section, read by AutoEP itself: it ignores misspelt keys and refuses values that a device cannot have."""

from typing import Any

import pytest
import torch
from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config

from mythos.config.model_schema import MixtureOfExperts
from mythos.engine.sections import expert_parallel_section

EXPERTS = MixtureOfExperts(experts=64, experts_per_token=6, expert_hidden_size=304, shared_hidden_size=608)
FASTER_FORMS = ("combine_impl", "gate_up_impl", "async_split_plan")


def section(size: int, device: str) -> dict[str, Any]:
    """The section, of which AutoEP has read every key and accepted every value."""
    found = expert_parallel_section(EXPERTS, size, ["loop.core.0.feed_forward"], torch.device(device))
    read = parse_autoep_config(found)
    assert {name: getattr(read, name) for name in found} == found
    validate_autoep_config(read, world_size=8, pp_size=1, tp_size=1, sp_size=1, zero_stage=3)
    return found


def test_a_cpu_uses_the_plain_forms() -> None:
    assert not set(section(2, "cpu")) & set(FASTER_FORMS)


@pytest.mark.parametrize(
    ("size", "capability", "expected"),
    [
        (1, (9, 0), ("fused_weighted_sum", "fused", False)),
        (8, (10, 0), ("fused_weighted_sum", "fused", True)),
        (8, (8, 0), ("fused_weighted_sum", "separate", True)),
    ],
)
def test_a_gpu_uses_the_fused_forms_that_it_has(
    size: int, capability: tuple[int, int], expected: tuple[str, str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = section(size, "cuda:0")
    assert tuple(found[name] for name in FASTER_FORMS) == expected


def test_without_triton_a_gpu_uses_the_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not set(section(2, "cuda:0")) & set(FASTER_FORMS)
