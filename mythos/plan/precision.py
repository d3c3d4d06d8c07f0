"""Bytes of one element of everything that training keeps or sends, by training type: in one place for all formulas.

These follow from the sections that ``mythos.engine.sections`` writes for DeepSpeed.
"""

from dataclasses import dataclass

from mythos.config.schema import Config


@dataclass(frozen=True)
class Bytes:
    """Bytes of one element."""

    weights: int
    """The weights that the model computes with."""
    gathered: int
    """The same, as ZeRO sends them."""
    gradients: int
    """Sums of gradients over micro batches."""
    reduced: int
    """Gradients, as ZeRO sends them."""
    master: int
    """fp32 weights that the optimizer updates, if they are a copy."""
    moments: int
    """Each of the optimizer's running means."""
    activations: int
    """The residual stream and what matrix products take and give."""
    exchanged: int
    """Tokens, as they are sent to experts."""
    orthogonalised: int
    """Matrices, as Muon sends and orthogonalises them."""


FP32 = Bytes(
    weights=4,
    gathered=4,
    gradients=4,
    reduced=4,
    master=4,
    moments=4,
    activations=4,
    exchanged=4,
    orthogonalised=4,
)
BF16 = Bytes(
    weights=2,
    gathered=2,
    gradients=2,
    reduced=2,
    master=4,
    moments=4,
    activations=2,
    exchanged=2,
    orthogonalised=2,
)


def element_bytes(config: Config, on_gpu: bool) -> Bytes:
    """Those of a run; ``precision: auto`` is bf16 on a GPU and fp32 on a CPU."""
    return BF16 if config.precision == "bf16" or (config.precision == "auto" and on_gpu) else FP32
