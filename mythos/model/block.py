"""One transformer block, the same in prelude, core, coda and in the dense baseline."""

from torch import Tensor, nn

from mythos.config.model_schema import Dense, Looped
from mythos.model.attention import build_attention


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Looped | Dense, feed_forward: nn.Module, value_gate: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = build_attention(config.width, config.attention, value_gate)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.feed_forward = feed_forward

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None = None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, value_embedding)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
