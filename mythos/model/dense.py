"""The standard transformer, baseline of the looped one."""

from torch import Tensor, nn

from mythos.config.schema import Dense
from mythos.model.block import Block
from mythos.model.depth import DepthPlan
from mythos.model.head import TiedHead
from mythos.model.layers import feed_forward, rotary_angles


class DenseTransformer(nn.Module):
    """y = head(blocks(embed(x))): every block has weights of its own and is run once."""

    def __init__(self, config: Dense) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, feed_forward(config.width, config.feed_forward)) for _ in range(config.layers)
        )
        self.head = TiedHead(config, self.embedding)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None, plan: DepthPlan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar), or logits (B, S, V) when ``targets_BS`` is None. There is no loop to plan or to watch."""
        attention = self.config.attention
        rotary = rotary_angles(tokens_BS.shape[1], attention.head_size, attention.rope_base, tokens_BS.device)
        x_BSD = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, rotary)
        return self.head(x_BSD, targets_BS), {}
