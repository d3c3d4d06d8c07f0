"""Final norm and output matrix, which is the embedding table once more."""

import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import Dense, Looped
from mythos.loss import cross_entropy


class TiedHead(nn.Module):
    """Logits = E norm(x), E the token table (V, D); with targets the loss instead of the logits."""

    def __init__(self, config: Looped | Dense, embedding: nn.Embedding, z_loss: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.weight = embedding.weight
        self.z_loss = z_loss

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None) -> Tensor:
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return F.linear(x_BSD, self.weight)
        return cross_entropy(x_BSD, self.weight, targets_BS, self.z_loss if self.training else 0.0)
