"""Bytes of one element of everything that training keeps or sends, by training type: in one place for all formulas.

These follow from the sections that ``mythos.engine.sections`` writes for DeepSpeed, and from the model's own types.
"""

from dataclasses import dataclass

from mythos.config.schema import Config


@dataclass(frozen=True)
class Bytes:
    """Bytes of one element, and which kernels the device has."""

    weights: int
    """The weights that the model computes with."""
    gathered: int
    """The same, as ZeRO sends them."""
    gradients: int
    """Sums of gradients over micro batches."""
    reduced: int
    """Gradients, as ZeRO sends them."""
    master: int
    """fp32 weights that the optimizer updates under ZeRO 1 to 3."""
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


FP32 = Bytes(4, 4, 4, 4, 4, 4, residual=4, products=4, fused_norms=False, fused_attention=False)
BF16 = Bytes(2, 2, 2, 2, 4, 4, residual=2, products=2, fused_norms=True, fused_attention=True)


def element_bytes(config: Config, on_gpu: bool) -> Bytes:
    """Those of a run; ``precision: auto`` is bf16 on a GPU and fp32 on a CPU."""
    return BF16 if config.precision == "bf16" or (config.precision == "auto" and on_gpu) else FP32
