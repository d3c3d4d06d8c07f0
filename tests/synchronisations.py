"""Counts the operations that make the host wait for a GPU; on a CPU, where the same are called."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",  # .item(), float(), bool()
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",  # torch.tensor, a copy from the host
    "masked_select",
    "nonzero",
    "unique_consecutive",
}
"""Operations whose result, or the size of whose result, the host must know, and copies from the host."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITING or by_mask:
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """``tolist`` of a tensor on the CPU calls no operation."""

    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.tolist:
            self.counted["tolist"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def count_synchronisations() -> Iterator[Counter[str]]:
    """How often each operation that waits is called inside, by its name."""
    counted: Counter[str] = Counter()
    with _Operations(counted), _Lists(counted):
        yield counted
