import pytest
import torch
from torch.testing import assert_close

from mythos.config.schema import Attention
from mythos.model.attention import GroupedQueryAttention
from mythos.model.layers import rotary_angles, rotate
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.attention import rotate_by_complex_numbers, slow_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_gradients_equal_the_definition(kv_heads: int) -> None:
    config = Attention(heads=4, kv_heads=kv_heads, head_size=6, rope_base=100.0)
    module = randomise(GroupedQueryAttention(10, config))
    x = numbers(2, 7, 10)
    fast = module(x, rotary_angles(7, 6, 100.0, CPU))
    slow = slow_attention(module, x)
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    inputs = (x, *module.parameters())
    for own, reference in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        assert_close(own, reference, rtol=1e-4, atol=1e-5)


def test_rotation_equals_multiplication_by_a_complex_unit() -> None:
    x = numbers(1, 1, 9, 8).detach()
    rotated = rotate(x, rotary_angles(9, 8, 50_000.0, CPU))
    assert_close(rotated[0, 0], rotate_by_complex_numbers(x[0, 0], 50_000.0), rtol=1e-6, atol=1e-6)


def test_no_position_sees_a_later_one() -> None:
    config = Attention(heads=2, kv_heads=2, head_size=4)
    module = randomise(GroupedQueryAttention(8, config))
    rotary = rotary_angles(6, 4, config.rope_base, CPU)
    x = numbers(1, 6, 8).detach()
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = module(x, rotary), module(changed, rotary)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
