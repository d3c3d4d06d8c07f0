"""Bytes of one element of everything that training keeps or sends, by training type: in one place for all formulas.

These follow from the sections that ``mythos.engine.sections`` writes for DeepSpeed, and from the model's own types.
"""

from dataclasses import dataclass

from mythos.config.schema import Config
from mythos.plan.layout import Held
from mythos.plan.tensors import Treatment


@dataclass(frozen=True)
class Bytes:
    """Bytes of one element, and which kernels the device has."""

    weights: int
    """The weights, also where ZeRO has gathered them."""
    gradients: int
    """Sums of gradients over micro batches."""
    reduced: int
    """Gradients, as ZeRO sends them."""
    moments: int
    """Each of the optimizer's running means."""
    residual: int
    """The residual stream and the loop's state."""
    products: int
    """What matrix products take and give; tokens as they are sent to experts; matrices that Muon orthogonalises."""
    fused_norms: bool
    """A norm keeps its input only, not the normalised form as well."""
    fused_attention: bool
    """Attention with values of another size than the keys keeps no scores."""

    def gathered_as(self, parameter: Held) -> int:
        """A weight as ZeRO 3 gathers it: the matrices of blocks and experts in the type of their products."""
        in_products = parameter.treatment in (Treatment.MATRIX, Treatment.EXPERT)
        return self.products if in_products else self.weights


FP32 = Bytes(4, 4, 4, 4, residual=4, products=4, fused_norms=False, fused_attention=False)
BF16 = Bytes(4, 4, 4, 4, residual=4, products=2, fused_norms=True, fused_attention=True)


def element_bytes(config: Config, on_gpu: bool) -> Bytes:
    """Those of a run; ``precision: auto`` is bf16 on a GPU and fp32 on a CPU."""
    return BF16 if config.precision == "bf16" or (config.precision == "auto" and on_gpu) else FP32
