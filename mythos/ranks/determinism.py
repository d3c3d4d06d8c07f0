"""The same bits in every run on a GPU; a CPU gives them without any setting."""

from collections.abc import MutableMapping

import torch


def compute_deterministically(environ: MutableMapping[str, str]) -> None:
    """From now on every operation is deterministic, or raises RuntimeError. Call it before the first matrix product."""
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    # With warn_only=True the backward passes of attention would stay as they are.
    torch.use_deterministic_algorithms(True)
    # NaN in every new tensor is for debugging, and slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
