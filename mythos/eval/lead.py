"""Work that rank 0 does alone, in which all ranks take part where it calls the model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mythos.errors import UserError

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


def lead(work: Callable[[Callable[[Argument], Answer]], Result], together: Callable[[Argument], Answer]) -> Result:
    """Run ``work`` on rank 0; returns its result on all ranks. Collective.

    Where it calls its argument, all ranks call ``together`` with what it passes. So the number of collectives does not
    depend on files that only rank 0 reads.

    Raises:
        UserError: ``work`` raises one; on all ranks.
    """
    if dist.get_rank() > 0:
        while not (message := _from_rank_0(None))["done"]:
            together(message["argument"])
        result, error = message["result"], message["error"]
    else:

        def call(argument: Argument) -> Answer:
            _from_rank_0({"done": False, "argument": argument})
            return together(argument)

        result = error = None
        try:
            result = work(call)
        except UserError as failure:
            error = str(failure)
        _from_rank_0({"done": True, "result": result, "error": error})
    if error is not None:
        raise UserError(error, agreed=True)
    return result  # type: ignore[return-value]


def _from_rank_0(message: dict[str, Any] | None) -> dict[str, Any]:
    received = [message]
    dist.broadcast_object_list(received, src=0)
    assert received[0] is not None
    return received[0]
