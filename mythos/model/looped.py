"""The looped transformer: prelude, recurrent core, coda."""

from torch import Tensor, nn

from mythos.config.schema import Looped
from mythos.model.block import Block
from mythos.model.depth import DepthPlan
from mythos.model.head import TiedHead
from mythos.model.layers import feed_forward, rotary_angles
from mythos.model.loop import Loop


class LoopedTransformer(nn.Module):
    """e = norm(prelude(embed(x))); h = loop(e); y = head(coda(C h)) (arXiv 2604.12946).

    The norm after the prelude keeps long runs from blowing up although the loop itself is stable.
    """

    def __init__(self, config: Looped, recompute: bool) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.prelude = _blocks(config, config.prelude_layers)
        self.prelude_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.loop = Loop(config, recompute)
        self.readout = nn.Linear(config.width, config.width, bias=False)
        self.coda = _blocks(config, config.coda_layers)
        self.head = TiedHead(config, self.embedding)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None, plan: DepthPlan
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar), or logits (B, S, V) when ``targets_BS`` is None; and the loop's diagnostics."""
        attention = self.config.attention
        rotary = rotary_angles(tokens_BS.shape[1], attention.head_size, attention.rope_base, tokens_BS.device)
        x_BSD = self.embedding(tokens_BS)
        for block in self.prelude:
            x_BSD = block(x_BSD, rotary)
        h_BSD, health = self.loop(self.prelude_norm(x_BSD), rotary, plan)
        x_BSD = self.readout(h_BSD)
        for block in self.coda:
            x_BSD = block(x_BSD, rotary)
        return self.head(x_BSD, targets_BS), health


def _blocks(config: Looped, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(config, feed_forward(config.width, config.feed_forward)) for _ in range(count))
