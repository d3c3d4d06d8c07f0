"""The standard transformer, baseline of the looped one."""

from torch import Tensor, nn

from mythos.config.model_schema import Dense
from mythos.model.attention import ValueEmbeddings, has_value_embedding, rotary_for
from mythos.model.block import Block
from mythos.model.head import TiedHead
from mythos.model.layers import feed_forward


class DenseTransformer(nn.Module):
    """y = head(blocks(embed(x))): every block has weights of its own and is run once."""

    def __init__(self, config: Dense, z_loss: float) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.value_embeddings = ValueEmbeddings(config, config.layers)
        self.blocks = nn.ModuleList(
            Block(
                config,
                feed_forward(config.width, config.feed_forward),
                has_value_embedding(config, layer, config.layers),
            )
            for layer in range(config.layers)
        )
        self.head = TiedHead(config, self.embedding, z_loss)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (scalar), or logits (B, S, V) when ``targets_BS`` is None. There are no diagnostics."""
        rotary = rotary_for(self.config.attention, tokens_BS.shape[1], tokens_BS.device)
        x_BSD = self.embedding(tokens_BS)
        for block, value in zip(self.blocks, self.value_embeddings(tokens_BS), strict=True):
            x_BSD = block(x_BSD, rotary, value)
        return self.head(x_BSD, targets_BS), {}
