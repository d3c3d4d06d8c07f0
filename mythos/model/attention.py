"""Causal self-attention: grouped-query and multi-head latent, both through one scaled_dot_product_attention.

A new kind is a class with the methods of these two, and a case in ``build_attention``.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mythos.config.model_schema import VALUE_GATE_CHANNELS, Dense, GroupedQuery, Latent, Looped, has_value_embedding
from mythos.model.cache import LayerCache
from mythos.model.layers import rotary_angles, rotate
from mythos.model.precision import Linear, RMSNorm, rounded
from mythos.model.rules import Rule, Start, normal, orthogonal, uniform


class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(C) + causal) v, where each of K key/value heads serves H/K query heads.

    Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245); multi-head attention when K = H.
    All channels of queries and keys are rotated, then RMS-normalised without a learned scale.
    A value embedding u (one row for each input token) is added through a gate for each head:
    v <- v + 2 sigmoid(W x[:32]) u (arXiv 2604.12946).
    """

    def __init__(self, width: int, config: GroupedQuery, value_gate: bool) -> None:
        super().__init__()
        self.config = config
        self.query = Linear(width, config.heads * config.head_size)
        self.key_value = Linear(width, 2 * config.kv_heads * config.head_size)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.kv_heads) if value_gate else None
        self.out = Linear(config.heads * config.head_size, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The output projection is zero: every block starts as the identity."""
        rules: dict[Tensor, Rule] = {self.out.weight: torch.zeros_like}
        if start.options.key_value == "each":
            rules[self.key_value.weight] = orthogonal(start.deviation, stacked=2)
        if self.value_gate is not None and start.options.value_gates == "uniform":
            rules[self.value_gate.weight] = uniform(VALUE_GATE_CHANNELS**-0.5)
        return rules

    def stacked_matrices(self) -> dict[Tensor, int]:
        """Key and value."""
        return {self.key_value.weight: 2}

    @property
    def cached_channels(self) -> int:
        """Numbers per token in a cache: keys and values."""
        return self.key_value.out_features

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin for all channels of a head, (S, C/2)."""
        return rotary_angles(length, self.config.head_size, self.config.rope_base, device)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embedding: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D). ``value_embedding`` is (B, S, K x C), or None in a layer without one.

        With a cache, which keeps keys and values, x is of the new tokens only.
        """
        batch, length, _ = x_BSD.shape
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        q_BHSC = self.query(x_BSD).view(batch, length, heads, size).transpose(1, 2)
        k_BKSC, v_BKSC = self.key_value(x_BSD).view(batch, length, 2, kv_heads, size).permute(2, 0, 3, 1, 4)
        if self.value_gate is not None and value_embedding is not None:
            gate_BKS = 2 * torch.sigmoid(self.value_gate(x_BSD[..., :VALUE_GATE_CHANNELS])).transpose(1, 2)
            embedded_BKSC = value_embedding.view(batch, length, kv_heads, size).transpose(1, 2)
            v_BKSC = (v_BKSC + gate_BKS[..., None] * embedded_BKSC).type_as(v_BKSC)
        q_BHSC, k_BKSC = rotate(q_BHSC, rotary), rotate(k_BKSC, rotary)
        if self.config.qk_norm:
            q_BHSC = F.rms_norm(q_BHSC, (size,), eps=self.config.qk_norm_epsilon)
            k_BKSC = F.rms_norm(k_BKSC, (size,), eps=self.config.qk_norm_epsilon)
        if cache is not None:
            seen_BLC = cache.add(torch.stack((k_BKSC, v_BKSC), dim=1).permute(0, 3, 1, 2, 4).flatten(2))
            if cache.new.sees_B1SL is not None:
                k_BKLC, v_BKLC = seen_BLC.unflatten(-1, (2, kv_heads, size)).permute(2, 0, 3, 1, 4)
                return self.out(_attend_to_seen(q_BHSC, k_BKLC, v_BKLC, cache.new.sees_B1SL, size**-0.5))
        return self.out(_attend(q_BHSC, k_BKSC, v_BKSC))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    c_q = norm(W x); q = W c_q, for each head a part without and a part with rotation.
    c_kv = norm(W x); k, v = W c_kv; one rotated key W x is shared by all heads. Scores use both parts of q and k.

    A cache keeps only c_kv and the shared key. With it the products are absorbed: q . W_k c = W_k^T q . c, and the
    heads' values are W_v times their means of c.
    """

    def __init__(self, width: int, config: Latent) -> None:
        super().__init__()
        self.config = config
        heads, latent = config.heads, config.key_value_latent_size
        self.query_down = Linear(width, config.query_latent_size)
        self.query_norm = RMSNorm(config.query_latent_size, eps=1e-6)
        self.query_up = Linear(config.query_latent_size, heads * (config.content_head_size + config.rotary_head_size))
        self.key_value_down = Linear(width, latent + config.rotary_head_size)
        self.key_value_norm = RMSNorm(latent, eps=1e-6)
        self.key_value_up = Linear(latent, heads * (config.content_head_size + config.value_head_size))
        self.out = Linear(heads * config.value_head_size, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The output projection is zero: every block starts as the identity."""
        return {self.out.weight: torch.zeros_like}

    @property
    def cached_channels(self) -> int:
        """Numbers per token in a cache: the latent and the shared rotated key."""
        return self.key_value_down.out_features

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin for the channels of a head that are rotated."""
        return rotary_angles(length, self.config.rotary_head_size, self.config.rope_base, device)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embedding: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D). ``value_embedding`` must be None: values are computed from the latent.

        With a cache, x is of the new tokens only.
        """
        batch, length, _ = x_BSD.shape
        content, rotated, value = (
            self.config.content_head_size,
            self.config.rotary_head_size,
            self.config.value_head_size,
        )
        q_BSHC = self.query_up(self.query_norm(self.query_down(x_BSD))).unflatten(-1, (-1, content + rotated))
        q_content, q_rotary = q_BSHC.transpose(1, 2).split((content, rotated), dim=-1)
        latent, shared_key = self.key_value_down(x_BSD).split((self.config.key_value_latent_size, rotated), dim=-1)
        latent, q_rotary = self.key_value_norm(latent), rotate(q_rotary, rotary)
        k_rotary = rotate(shared_key[:, None], rotary)
        if cache is not None:
            seen_BLC = cache.add(torch.cat((latent, k_rotary[:, 0]), dim=-1))
            if cache.new.sees_B1SL is not None:
                return self.out(self._attend_to_latents(q_content, q_rotary, seen_BLC, cache.new.sees_B1SL))
        up_BSHC = self.key_value_up(latent).unflatten(-1, (-1, content + value))
        k_content, v_BHSC = up_BSHC.transpose(1, 2).split((content, value), dim=-1)
        q_BHSC = torch.cat((q_content, q_rotary), dim=-1)
        k_BHSC = torch.cat((k_content, k_rotary.expand(batch, self.config.heads, length, rotated)), dim=-1)
        return self.out(_attend(q_BHSC, k_BHSC, v_BHSC))

    def _attend_to_latents(self, q_content: Tensor, q_rotary: Tensor, seen_BLC: Tensor, sees_B1SL: Tensor) -> Tensor:
        """The heads' values with absorbed products, (B, S, H x C). Keys and values of all heads are the entries."""
        content, value, latent = (
            self.config.content_head_size,
            self.config.value_head_size,
            self.config.key_value_latent_size,
        )
        up_HCc = rounded(self.key_value_up.weight).unflatten(0, (-1, content + value))
        k_up, v_up = up_HCc.split((content, value), dim=1)
        q_BHSC = torch.cat((torch.einsum("bhsk,hkc->bhsc", q_content, k_up), q_rotary), dim=-1)
        seen_B1LC, scale = seen_BLC[:, None], (content + self.config.rotary_head_size) ** -0.5
        mean_BSE = _attend_to_seen(q_BHSC, seen_B1LC, seen_B1LC, sees_B1SL, scale)
        mean_BSHc = mean_BSE.unflatten(-1, (self.config.heads, -1))[..., :latent]
        return torch.einsum("bshc,hvc->bshv", mean_BSHc, v_up).flatten(2)


class ValueEmbeddings(nn.Module):
    """A table for every second layer, counted from the last, that is looked up by the input tokens.

    A layer inside the loop has one table: it is looked up once per forward pass and used at every loop step.
    """

    def __init__(self, config: Looped | Dense, layers: int) -> None:
        super().__init__()
        channels = value_embedding_channels(config)
        with_table = [layer for layer in range(layers) if has_value_embedding(config, layer, layers)]
        self.tables = nn.ModuleDict(
            {str(layer): nn.Embedding(config.vocabulary_size, channels) for layer in with_table}
        )
        self.layers = layers

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """Tables have deviation 1 where ``init.value_tables`` says so."""
        if start.options.value_tables == "normal":
            return {}
        return {table: normal(1.0) for table in self.tables.parameters()}

    def forward(self, tokens_BS: Tensor) -> list[Tensor | None]:
        """For each layer the rows (B, S, K x C) of its table, or None."""
        found = {layer: table(tokens_BS) for layer, table in self.tables.items()}
        return [found.get(str(layer)) for layer in range(self.layers)]


def value_embedding_channels(config: Looped | Dense) -> int:
    """Channels of a row of a value table."""
    attention = config.attention
    return attention.kv_heads * attention.head_size if isinstance(attention, GroupedQuery) else 0


def build_attention(
    width: int, config: GroupedQuery | Latent, value_gate: bool
) -> GroupedQueryAttention | LatentAttention:
    """The attention that the configuration names."""
    match config:
        case GroupedQuery():
            return GroupedQueryAttention(width, config, value_gate)
        case Latent():
            return LatentAttention(width, config)


def _attend(q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
    """Causal attention with concatenated heads: (B, S, H x C); where the kernel is chosen.

    Latent attention has larger queries and keys than values, which only cuDNN's kernel takes as they are. For the flash
    kernels, of GPUs and of CPUs, values are padded with zeros, which costs less than torch's plain form, whose S x S
    scores of every head are in memory. For equal sizes, and for fp32 on GPUs, torch itself chooses a fused kernel.
    """
    batch, heads, length, size = q_BHSC.shape
    value = v_BKSC.shape[-1]
    if batch == 0:  # which torch 2.11 refuses; the inputs remain in the graph
        return q_BHSC.new_zeros(0, length, heads * value) + (q_BHSC.sum() + k_BKSC.sum() + v_BKSC.sum())
    if size <= value or (q_BHSC.is_cuda and q_BHSC.dtype == torch.float32):
        return _fused(q_BHSC, k_BKSC, v_BKSC).transpose(1, 2).flatten(2)
    if q_BHSC.is_cuda and _cudnn_takes_latent():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            return _fused(q_BHSC, k_BKSC, v_BKSC).transpose(1, 2).flatten(2)
    y_BHSC = _fused(q_BHSC, k_BKSC, F.pad(v_BKSC, (0, size - value)))
    return y_BHSC[..., :value].transpose(1, 2).flatten(2)


def _fused(q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
    grouped = q_BHSC.shape[1] != k_BKSC.shape[1]
    return F.scaled_dot_product_attention(q_BHSC, k_BKSC, v_BKSC, is_causal=True, enable_gqa=grouped)


@cache
def _cudnn_takes_latent() -> bool:
    """Whether cuDNN's attention takes values smaller than queries: from version 9.11 on Hopper."""
    return torch.cuda.get_device_capability() >= (9, 0) and (torch.backends.cudnn.version() or 0) >= 91100


def _attend_to_seen(q_BHSC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, sees_B1SL: Tensor, scale: float) -> Tensor:
    """Attention of one token a sequence (S = 1) to the entries of a cache, with concatenated heads: (B, 1, H x C).

    The query heads of a group are handed over as its tokens, which see the same: no key or value is repeated.
    """
    q_BKGC = q_BHSC.squeeze(2).unflatten(1, (k_BKLC.shape[1], -1))
    y_BKGC = F.scaled_dot_product_attention(
        q_BKGC, k_BKLC.type_as(q_BKGC), v_BKLC.type_as(q_BKGC), attn_mask=sees_B1SL, scale=scale
    )
    return y_BKGC.flatten(1, 3)[:, None]
