"""What is changed in AutoEP's layers after DeepSpeed has put them in the model."""

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from mythos.model.moe import Gate, WithoutExchange, moe_layers


class LocalExperts(WithoutExchange, AutoEPMoELayer):
    """A layer whose experts are all on this rank: y = shared(x) + sum over the chosen experts of w_e expert_e(x).

    AutoEP's own form copies each token three times on the way to an expert and back, and adds up gradients row by row.
    On a GPU it has kernels for that; on a CPU this one copies once in each direction.
    """

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, chosen_Tk, load_E = self.router(x_TD, self.expert_bias)
        self.tokens_per_expert.add_(load_E)
        return self.routed(x_TD, chosen_Tk, weights_Tk, load_E).view_as(x_BSD) + self.shared_experts(x_BSD)


def adapt_layers(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Check that the layers of these names were converted, and change their classes.

    Raises:
        RuntimeError: AutoEP silently skips a layer whose names do not match; its experts would train without
            synchronisation.
    """
    modules = dict(model.named_modules())
    left = [name for name in names if type(modules[name]) is not AutoEPMoELayer]
    if left:
        raise RuntimeError(f"AutoEP did not convert {left}: a name in expert_parallel_section is wrong")
    for layer in moe_layers(model):
        layer.router.gate.__class__ = Gate  # AutoEP's own would compute the logits in bf16
        if layer.ep_size == 1 and device.type == "cpu":
            layer.__class__ = LocalExperts
