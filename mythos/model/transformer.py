"""The two kinds of model: the looped transformer (prelude, recurrent core, coda) and its baseline, the standard one.

Both are called alike, and return logits (B, S, V), or ``Losses`` when they are given targets:

    model(tokens_BS)        model(tokens_BS, depth=8)        model(tokens_BS, targets_BS, plan)
"""

import math
from collections.abc import Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.loop_schema import Loop as LoopOptions
from mythos.config.model_schema import Dense, Looped, has_value_embedding
from mythos.loss import Losses, Mean, cross_entropy_and_z_loss, sequence_losses
from mythos.model.attention import ValueEmbeddings
from mythos.model.block import Block
from mythos.model.cache import Cache, LayerCache, allocate
from mythos.model.depth import DepthPlan, fixed
from mythos.model.layers import feed_forward
from mythos.model.loop import ExitRule, Loop
from mythos.model.precision import Linear, RMSNorm, products_in
from mythos.model.rules import Rule, Start, constant, orthogonal


class LoopedTransformer(nn.Module):
    """e = norm(prelude(embed(x))); h = loop(e); y = head(coda(C h)) (arXiv 2604.12946).

    The norm after the prelude prevents divergence in long runs, although the loop itself is stable.
    """

    product_type = torch.float32
    """Of the inputs of matrix products."""

    def __init__(self, config: Looped, options: LoopOptions, z_loss: float) -> None:
        super().__init__()
        self.config = config
        self.mean_depth = round(options.mean_depth)
        before_coda = config.prelude_layers + config.core_layers
        layers = before_coda + config.coda_layers
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.value_embeddings = ValueEmbeddings(config, layers)
        self.prelude = _blocks(config, range(config.prelude_layers), layers)
        self.prelude_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.loop = Loop(config, options)
        self.readout = Linear(config.width, config.width)
        self.coda = _blocks(config, range(before_coda, layers), layers)
        self.head = TiedHead(config, self.embedding, z_loss)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        depth: DepthPlan | int | None = None,
        exit_rule: ExitRule | None = None,
        count: float | None = None,
        cache: Cache | None = None,
    ) -> Tensor | Losses:
        """The logits or the losses, in the order of ``tokens_BS``; inside, the sequences are in the plan's order.

        Args:
            depth: the mean depth of training if it is not given.
            count: see ``cross_entropy_and_z_loss``.
            cache: of the tokens before, to which these are added; it has the depth. The result are the logits after
                each sequence's last token, (B, V).
        """
        if cache is not None:
            depth = fixed(cache.depth, len(tokens_BS))
        elif not isinstance(depth, DepthPlan):
            depth = fixed(self.mean_depth if depth is None else depth, len(tokens_BS))
        with products_in(self.product_type, tokens_BS.device):
            return self._forward(tokens_BS, targets_BS, depth, exit_rule, count, cache)

    def _forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        depth: DepthPlan,
        exit_rule: ExitRule | None,
        count: float | None,
        cache: Cache | None,
    ) -> Tensor | Losses:
        tokens_BS = _reordered(tokens_BS, depth.order)
        new = None if cache is None else cache.begin(tokens_BS.shape[1])
        rotary = _rotary(self.prelude, tokens_BS) if new is None else new.rotary
        x_BSD, values = self.embedding(tokens_BS), self.value_embeddings(tokens_BS)
        first, end = len(self.prelude), len(self.prelude) + self.config.core_layers
        x_BSD = _run(self.prelude, x_BSD, rotary, values[:first], new.prelude() if new else None)
        h_BSD, penalties_P, health = self.loop(
            self.prelude_norm(x_BSD), values[first:end], rotary, depth, exit_rule, new
        )
        x_BSD = self.readout(h_BSD).type_as(h_BSD)
        x_BSD = _run(self.coda, x_BSD, rotary, values[end:], new.coda() if new else None)
        if new is not None:
            return self.head(new.finish(x_BSD), None, None)
        places = _inverse(depth.order)
        if targets_BS is None:
            return _reordered(self.head(x_BSD, None, None), places)
        losses = self.head(x_BSD, _reordered(targets_BS, depth.order), count)
        if losses.by_sequence_B is not None:
            losses = losses._replace(by_sequence_B=_reordered(losses.by_sequence_B, places))
        weighted = zip(self.loop.penalty_weights.items(), penalties_P, strict=True)
        penalties = {name: penalty for (name, weight), penalty in weighted if weight and self.training}
        return losses.plus(penalties, health)


class DenseTransformer(nn.Module):
    """y = head(blocks(embed(x))): every block has its own weights and is run once."""

    product_type = torch.float32
    """Of the inputs of matrix products."""

    def __init__(self, config: Dense, z_loss: float) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.value_embeddings = ValueEmbeddings(config, config.layers)
        self.blocks = _blocks(config, range(config.layers), config.layers)
        self.head = TiedHead(config, self.embedding, z_loss)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        depth: None = None,
        exit_rule: None = None,
        count: float | None = None,
        cache: Cache | None = None,
    ) -> Tensor | Losses:
        """The logits or the losses; ``count``: see ``cross_entropy_and_z_loss``; ``cache``: see the looped model."""
        if depth is not None or exit_rule is not None:
            raise ValueError("a dense model has no loop: leave out depth and exit_rule")
        with products_in(self.product_type, tokens_BS.device):
            return self._forward(tokens_BS, targets_BS, count, cache)

    def _forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None, count: float | None, cache: Cache | None
    ) -> Tensor | Losses:
        new = None if cache is None else cache.begin(tokens_BS.shape[1])
        rotary = _rotary(self.blocks, tokens_BS) if new is None else new.rotary
        x_BSD, values = self.embedding(tokens_BS), self.value_embeddings(tokens_BS)
        x_BSD = _run(self.blocks, x_BSD, rotary, values, new.prelude() if new else None)
        return self.head(x_BSD if new is None else new.finish(x_BSD), targets_BS, count)


Model = LoopedTransformer | DenseTransformer


def new_cache(
    model: nn.Module, prompts: Sequence[int], tokens: int, depth: int | None, device: torch.device, state_seed: int = 0
) -> Cache:
    """An empty cache for ``model(tokens_BS, cache=...)``, which takes the prompts first.

    Args:
        prompts: how many tokens each prompt has.
        tokens: how many each sequence may have.
        depth: loop steps; None for a dense model.
        state_seed: of the initial loop state of every sequence, as if it were alone.
    """
    assert isinstance(model, Model)
    block = model.blocks[0] if isinstance(model, DenseTransformer) else model.prelude[0]
    assert isinstance(block, Block)
    rotary = block.attention.rotary(tokens, device)
    channels, seeds = block.attention.cached_channels, [state_seed] * len(prompts)
    weight_type = model.embedding.weight.dtype
    dtype = model.product_type if weight_type == torch.float32 else weight_type
    return allocate(model.config, channels, rotary, depth or 0, prompts, seeds, dtype)


class TiedHead(nn.Module):
    """Logits (B, S, V) = E norm(x), where E is the token table (V, D); with targets, the losses instead."""

    def __init__(self, config: Looped | Dense, embedding: nn.Embedding, z_loss: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.weight = embedding.weight
        self.z_loss = z_loss
        self.half_log_vocabulary = math.log(config.vocabulary_size) / 2

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The rules of ``init.token_table`` and ``init.head_norm``.

        While all output projections are zero, x of a standard transformer is the input token's row e of E, and the
        logit of that token is |e|^2 / rms(e), about s x width with s the table's deviation: 24.8 at width 1,536,
        against a deviation of 0.6 of the others. The readout of a looped model is a rotation: none of its logits is
        large. A small norm brings that logit down to half of ln V, so that exp of it is far below V.
        """
        rules: dict[Tensor, Rule] = {}
        if start.options.token_table == "orthogonal":
            rules[self.weight] = orthogonal(start.deviation)
        if start.options.head_norm == "small":
            rules[self.norm.weight] = constant(min(1.0, self.half_log_vocabulary / (start.deviation * start.width)))
        return rules

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None, count: float | None) -> Tensor | Losses:
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return F.linear(x_BSD, self.weight).type_as(self.weight)
        if not self.training:
            by_sequence_B = sequence_losses(x_BSD, self.weight, targets_BS)
            return Losses(by_sequence_B.mean(), by_sequence_B.mean().detach(), {}, by_sequence_B.detach())
        loss = cross_entropy_and_z_loss(x_BSD, self.weight, targets_BS, self.z_loss, count)
        return Losses(loss.total, loss.cross_entropy, {"train/z_loss": Mean(loss.z_loss)} if self.z_loss else {})


def _run(
    blocks: nn.ModuleList,
    x_BSD: Tensor,
    rotary: tuple[Tensor, Tensor],
    values: Sequence[Tensor | None],
    caches: Sequence[LayerCache] | None,
) -> Tensor:
    """x after all blocks."""
    for block, value, cache in zip(blocks, values, caches or repeat(None, len(blocks)), strict=True):
        x_BSD = block(x_BSD, rotary, value, cache)
    return x_BSD


def _rotary(blocks: nn.ModuleList, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotations, which are the same in every block."""
    first = blocks[0]
    assert isinstance(first, Block)
    return first.attention.rotary(tokens_BS.shape[1], tokens_BS.device)


def _blocks(config: Looped | Dense, numbers: range, layers: int) -> nn.ModuleList:
    return nn.ModuleList(
        Block(config, feed_forward(config.width, config.feed_forward), has_value_embedding(config, number, layers))
        for number in numbers
    )


def _reordered(tensor_B: Tensor, order: tuple[int, ...]) -> Tensor:
    """Row ``order[i]`` as row i. Slices are joined, since an index tensor would be a copy that waits for the device."""
    if order == tuple(range(len(order))):
        return tensor_B
    rows = tensor_B.split(1)
    return torch.cat([rows[place] for place in order])


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
