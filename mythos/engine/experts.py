"""What is changed in AutoEP's layers after DeepSpeed has put them in the model."""

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, _split_plan_from_expert_counts
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn

from mythos.model.grouped import Rows, grouped_linear, inverse
from mythos.model.moe import Gate, Gated, RoutedSum, moe_layers


class CPULayer(RoutedSum, AutoEPMoELayer):
    """AutoEP's layer on a CPU: y = shared(x) + sum over the chosen experts of w_e expert_e(x).

    AutoEP's own form copies each token up to three times on the way to an expert and back, and adds up gradients row by
    row. On a GPU it has kernels for that. This form copies a token once, and once more if it comes from another rank.
    """

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_Tk, chosen_Tk, load_E = self.router(x_TD, self.expert_bias)
        self.tokens_per_expert.add_(load_E)
        return self.routed_sum(x_TD, chosen_Tk, weights_Tk, load_E).view_as(x_BSD) + self.shared_experts(x_BSD)

    def expert_outputs(self, rows_D: Tensor, load_E: Tensor) -> Tensor:
        """Each row goes to the rank of its expert, and its output comes back."""
        if self.ep_size == 1:
            return super().expert_outputs(rows_D, load_E)
        plan = _split_plan_from_expert_counts(load_E, self.ep_size, self.num_local_experts, self.ep_group)
        # Rows arrive sorted by the rank from which they come, then by expert.
        expert = torch.arange(self.num_local_experts).repeat(self.ep_size)
        order = expert.repeat_interleave(plan.local_counts_by_source.flatten()).argsort(stable=True)
        place = inverse(order)
        rows_D = _AllToAllV.apply(self.ep_group, rows_D, plan.input_splits, plan.output_splits)
        rows_D = Rows.apply(rows_D, order, place, 1)
        rows_D = self.experts(rows_D, plan.local_counts_by_source.sum(dim=0))
        rows_D = Rows.apply(rows_D, place, order, 1)
        return _AllToAllV.apply(self.ep_group, rows_D, plan.output_splits, plan.input_splits)


class CPUExperts(Gated, GroupedExperts):
    """The experts of this rank: w2_e (silu(w1_e x) * w3_e x) for the rows x of each expert e."""

    def forward(self, rows_D: Tensor, load_E: Tensor) -> Tensor:
        ends_E = load_E.cumsum(0, dtype=torch.int32)
        gate_F, up_F = grouped_linear(rows_D, self.w1, ends_E), grouped_linear(rows_D, self.w3, ends_E)
        return grouped_linear(self.gated(gate_F, up_F), self.w2, ends_E)


def adapt_layers(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Check that the layers of these names were converted, and change their classes.

    Raises:
        RuntimeError: AutoEP silently skips a layer whose names do not match; its experts would train without
            synchronisation.
    """
    modules = dict(model.named_modules())
    unconverted = [name for name in names if type(modules[name]) is not AutoEPMoELayer]
    if unconverted:
        raise RuntimeError(f"AutoEP did not convert {unconverted}: a name in expert_parallel_section is wrong")
    for layer in moe_layers(model):
        layer.router.gate.__class__ = Gate  # AutoEP's own would compute the logits in bf16
        if device.type == "cpu":
            use_cpu_form(layer)


def use_cpu_form(layer: AutoEPMoELayer) -> None:
    """Change the class of a layer and of its experts."""
    layer.__class__, layer.experts.__class__ = CPULayer, CPUExperts
