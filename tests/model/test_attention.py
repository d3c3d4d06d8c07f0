from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mythos.config.model_schema import GroupedQuery, Latent, has_value_embedding
from mythos.model.attention import (
    GroupedQueryAttention,
    LatentAttention,
    ValueEmbeddings,
    build_attention,
)
from mythos.model.layers import rotary_angles, rotate
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.attention import rotate_by_complex_numbers, slow_attention
from tests.tiny import tiny_config

CPU = torch.device("cpu")
LATENT = Latent(
    kind="mla",
    heads=3,
    query_latent_size=10,
    key_value_latent_size=8,
    content_head_size=6,
    rotary_head_size=4,
    value_head_size=5,
    rope_base=100.0,
)


def causal_mask(length: int) -> Tensor:
    return torch.full((1, 1, length, length), -torch.inf).triu(1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_value", [False, True])
def test_attention_and_its_gradients_equal_the_definition(kv_heads: int, with_value: bool) -> None:
    config = GroupedQuery(kind="gqa", heads=4, kv_heads=kv_heads, head_size=6, rope_base=100.0)
    module = randomise(GroupedQueryAttention(40, config, value_gate=with_value))
    x, value = numbers(2, 7, 40), numbers(2, 7, kv_heads * 6, seed=9) if with_value else None
    fast = module(x, rotary_angles(7, 6, 100.0, CPU), value)
    slow = slow_attention(module, x, value)
    assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    inputs = (x, *([value] if value is not None else []), *module.parameters())
    for own, reference in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        assert_close(own, reference, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_grouped_query_attention_equals_transformers_llama(kv_heads: int) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = GroupedQuery(kind="gqa", heads=4, kv_heads=kv_heads, head_size=8, rope_base=500.0, qk_norm=False)
    ours = randomise(GroupedQueryAttention(20, config, value_gate=False))
    llama = LlamaConfig(
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        rope_theta=500.0,
        attn_implementation="eager",
    )
    theirs = LlamaAttention(llama, layer_idx=0)
    key, value = ours.key_value.weight.chunk(2)
    with torch.no_grad():
        for target, source in (
            (theirs.q_proj, ours.query.weight),
            (theirs.k_proj, key),
            (theirs.v_proj, value),
            (theirs.o_proj, ours.out.weight),
        ):
            target.weight.copy_(source)
    x = numbers(2, 7, 20)
    angles = LlamaRotaryEmbedding(llama)(x, torch.arange(7)[None])
    own_output = ours(x, ours.rotary(7, CPU), None)
    their_output, _ = theirs(x, position_embeddings=angles, attention_mask=causal_mask(7))
    assert_close(own_output, their_output, rtol=1e-5, atol=1e-6)
    own = gradients(own_output, x, ours.query.weight, ours.key_value.weight, ours.out.weight)
    x_, q, k, v, o = gradients(
        their_output,
        x,
        theirs.q_proj.weight,
        theirs.k_proj.weight,
        theirs.v_proj.weight,
        theirs.o_proj.weight,
    )
    for gradient, expected in zip(own, (x_, q, torch.cat((k, v)), o), strict=True):
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_latent_attention_equals_transformers_deepseek_v3() -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    ours = randomise(LatentAttention(12, LATENT))
    deepseek = DeepseekV3Config(
        hidden_size=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=10,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rope_theta=100.0,
        rope_scaling=None,
        rope_interleave=False,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(deepseek, layer_idx=0)
    pairs = (
        (ours.query_down.weight, theirs.q_a_proj.weight),
        (ours.query_norm.weight, theirs.q_a_layernorm.weight),
        (ours.query_up.weight, theirs.q_b_proj.weight),
        (ours.key_value_down.weight, theirs.kv_a_proj_with_mqa.weight),
        (ours.key_value_norm.weight, theirs.kv_a_layernorm.weight),
        (ours.key_value_up.weight, theirs.kv_b_proj.weight),
        (ours.out.weight, theirs.o_proj.weight),
    )
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
    x = numbers(2, 7, 12)
    angles = DeepseekV3RotaryEmbedding(deepseek)(x, torch.arange(7)[None])
    own_output = ours(x, ours.rotary(7, CPU), None)
    their_output, _ = theirs(x, position_embeddings=angles, attention_mask=causal_mask(7))
    assert_close(own_output, their_output, rtol=1e-5, atol=1e-6)
    own = gradients(own_output, x, *(source for source, _ in pairs))
    reference = gradients(their_output, x, *(target for _, target in pairs))
    for gradient, expected in zip(own, reference, strict=True):
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_head_size", [5, 10])
def test_latent_attention_never_uses_the_plain_kernel(value_head_size: int) -> None:
    module = randomise(LatentAttention(12, replace(LATENT, value_head_size=value_head_size)))
    with torch.profiler.profile() as profile:
        gradients(module(numbers(2, 9, 12), module.rotary(9, CPU), None), *module.parameters())
    kernels = {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}
    assert kernels == {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }


def test_a_batch_without_sequences_passes_through() -> None:
    module = LatentAttention(12, LATENT)
    assert module(torch.empty(0, 9, 12), module.rotary(9, CPU), None).shape == (0, 9, 12)


def test_rotation_equals_multiplication_by_a_complex_unit() -> None:
    x = numbers(1, 1, 9, 8).detach()
    rotated = rotate(x, rotary_angles(9, 8, 50_000.0, CPU))
    assert_close(rotated[0, 0], rotate_by_complex_numbers(x[0, 0], 50_000.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [GroupedQuery(kind="gqa", heads=2, kv_heads=2, head_size=4), LATENT])
def test_no_position_sees_a_later_one(config: GroupedQuery | Latent) -> None:
    module = randomise(build_attention(8, config, value_gate=False))
    rotary = module.rotary(6, CPU)
    x = numbers(1, 6, 8).detach()
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = module(x, rotary, None), module(changed, rotary, None)
    assert_close(before[:, :4], after[:, :4], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize(("layers", "expected"), [(6, [1, 3, 5]), (5, [0, 2, 4]), (1, [0])])
def test_every_second_layer_counted_from_the_last_has_a_value_table(layers: int, expected: list[int]) -> None:
    config = tiny_config("dense", "data", "run", model__attention__value_embeddings=True).model
    assert [layer for layer in range(layers) if has_value_embedding(config, layer, layers)] == expected
    tables = ValueEmbeddings(config, layers)
    assert list(tables.tables) == [str(layer) for layer in expected]
    looked_up = tables(torch.tensor([[3, 5]]))
    assert [value is not None for value in looked_up] == [layer in expected for layer in range(layers)]
    assert torch.equal(looked_up[expected[0]][0, 1], tables.tables[str(expected[0])].weight[5])


def test_a_latent_cache_is_smaller_at_equal_width() -> None:
    full = GroupedQueryAttention(2048, GroupedQuery(kind="gqa", heads=16, kv_heads=16, head_size=128), False)
    grouped = GroupedQueryAttention(2048, GroupedQuery(kind="gqa", heads=16, kv_heads=4, head_size=128), False)
    latent = LatentAttention(
        2048,
        Latent(
            kind="mla",
            heads=16,
            query_latent_size=768,
            key_value_latent_size=512,
            content_head_size=128,
            rotary_head_size=64,
            value_head_size=128,
        ),
    )
    assert [module.cached_channels for module in (full, grouped, latent)] == [4096, 1024, 576]
