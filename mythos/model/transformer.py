"""The two kinds of model: the looped transformer (prelude, recurrent core, coda) and its baseline, the standard one."""

import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import Dense, Looped
from mythos.loss import cross_entropy, sequence_losses
from mythos.model.attention import ValueEmbeddings, has_value_embedding
from mythos.model.block import Block
from mythos.model.depth import DepthPlan
from mythos.model.layers import feed_forward
from mythos.model.loop import ExitRule, Loop


class LoopedTransformer(nn.Module):
    """e = norm(prelude(embed(x))); h = loop(e); y = head(coda(C h)) (arXiv 2604.12946).

    The norm after the prelude prevents divergence in long runs, although the loop itself is stable.
    """

    def __init__(self, config: Looped, recompute: bool, z_loss: float) -> None:
        super().__init__()
        self.config = config
        before_coda = config.prelude_layers + config.core_layers
        layers = before_coda + config.coda_layers
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.value_embeddings = ValueEmbeddings(config, layers)
        self.prelude = _blocks(config, range(config.prelude_layers), layers)
        self.prelude_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.loop = Loop(config, recompute)
        self.readout = nn.Linear(config.width, config.width, bias=False)
        self.coda = _blocks(config, range(before_coda, layers), layers)
        self.head = TiedHead(config, self.embedding, z_loss)
        self.ponder_weight = config.halting.ponder_weight if config.halting else 0.0

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        plan: DepthPlan,
        exit_rule: ExitRule | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (see ``TiedHead``), or logits (B, S, V) when ``targets_BS`` is None; and diagnostics.

        In training the loss includes the routing penalty and the ponder cost; their sum is in the diagnostics
        (``train/penalty``).
        """
        rotary = _rotary(self.prelude, tokens_BS)
        x_BSD, values = self.embedding(tokens_BS), self.value_embeddings(tokens_BS)
        first, end = len(self.prelude), len(self.prelude) + self.config.core_layers
        for block, value in zip(self.prelude, values[:first], strict=True):
            x_BSD = block(x_BSD, rotary, value)
        h_BSD, penalties, health = self.loop(self.prelude_norm(x_BSD), values[first:end], rotary, plan, exit_rule)
        x_BSD = self.readout(h_BSD)
        for block, value in zip(self.coda, values[end:], strict=True):
            x_BSD = block(x_BSD, rotary, value)
        result = self.head(x_BSD, targets_BS)
        if self.training and targets_BS is not None:
            total = result + penalties[0] + self.ponder_weight * penalties[1]
            health["train/penalty"] = (total - result).detach()
            return total, health
        return result, health


class DenseTransformer(nn.Module):
    """y = head(blocks(embed(x))): every block has its own weights and is run once."""

    def __init__(self, config: Dense, z_loss: float) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.value_embeddings = ValueEmbeddings(config, config.layers)
        self.blocks = _blocks(config, range(config.layers), config.layers)
        self.head = TiedHead(config, self.embedding, z_loss)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (see ``TiedHead``), or logits (B, S, V) when ``targets_BS`` is None. There are no diagnostics."""
        rotary = _rotary(self.blocks, tokens_BS)
        x_BSD = self.embedding(tokens_BS)
        for block, value in zip(self.blocks, self.value_embeddings(tokens_BS), strict=True):
            x_BSD = block(x_BSD, rotary, value)
        return self.head(x_BSD, targets_BS), {}


class TiedHead(nn.Module):
    """Logits (B, S, V) = E norm(x), where E is the token table (V, D); with targets, the loss instead of the logits.

    In training this is the mean loss (scalar), in evaluation mode the mean loss of each sequence (B,).
    """

    def __init__(self, config: Looped | Dense, embedding: nn.Embedding, z_loss: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.weight = embedding.weight
        self.z_loss = z_loss

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None) -> Tensor:
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return F.linear(x_BSD, self.weight)
        if self.training:
            return cross_entropy(x_BSD, self.weight, targets_BS, self.z_loss)
        return sequence_losses(x_BSD, self.weight, targets_BS)


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
