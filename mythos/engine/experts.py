"""What is changed in AutoEP's layers after DeepSpeed has put them in the model."""

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, compute_split_plan
from torch import Tensor, nn

from mythos.model.grouped import Rows
from mythos.model.moe import Gate, RoutedSum, moe_layers


class HostExperts(RoutedSum, AutoEPMoELayer):
    """AutoEP's layer on a CPU: y = shared(x) + sum over the chosen experts of w_e expert_e(x).

    AutoEP's own form copies each token up to three times on the way to an expert and back, and adds up gradients row by
    row. On a GPU it has kernels for that. This one gathers rows once before and once after each exchange.
    """

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, chosen_Tk, load_E = self.router(x_TD, self.expert_bias)
        self.tokens_per_expert.add_(load_E)
        return self.routed_sum(x_TD, chosen_Tk, weights_Tk, load_E).view_as(x_BSD) + self.shared_experts(x_BSD)

    def outputs(self, rows_D: Tensor, load_E: Tensor) -> Tensor:
        """Each row goes to the rank of its expert and comes back."""
        if self.ep_size == 1:
            return super().outputs(rows_D, load_E)
        plan = compute_split_plan(rows_D, self.num_experts, self.ep_size, self.num_local_experts, self.ep_group, load_E)
        received_D = _AllToAllV.apply(self.ep_group, rows_D, plan.input_splits, plan.output_splits)
        # They are sorted by the rank from which they come, then by expert.
        expert = torch.arange(self.num_local_experts).repeat(self.ep_size)
        order = expert.repeat_interleave(plan.local_counts_by_source.flatten()).argsort(stable=True)
        place = order.argsort()
        by_expert_D = Rows.apply(received_D, order, place, 1)
        outputs_D = self.experts(by_expert_D, plan.local_counts_by_source.sum(dim=0))
        outputs_D = Rows.apply(outputs_D, place, order, 1)
        return _AllToAllV.apply(self.ep_group, outputs_D, plan.output_splits, plan.input_splits)


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
        if device.type == "cpu":
            layer.__class__ = HostExperts
