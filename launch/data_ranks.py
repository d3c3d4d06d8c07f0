"""How the `mythos data` commands share their work: local processes, or the ranks of a launcher."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mythos.errors import UserError

if TYPE_CHECKING:
    from data_prep.workers import Workers
    from mythos.ranks.world import World


def lead_or_serve(processes: int | None, lead: Callable[["Workers"], int]) -> int:
    """Rank 0 runs the command; the other ranks process the items that it distributes, and end with its exit code."""
    from mythos.ranks.world import read_world

    with read_world() as world:
        _check_launcher(world, processes)
        from data_prep.workers import Workers, serve

        if world.rank > 0:
            exit_code = serve(world)
            if exit_code:
                sys.exit(exit_code)  # so that MPI does not wait for the other ranks
            return exit_code
        count = 1 if world.world_size > 1 else processes or len(os.sched_getaffinity(0))
        with Workers(world, count) as workers:
            return lead(workers)


def _check_launcher(world: "World", processes: int | None) -> None:
    if world.world_size > 1 and processes is not None:
        raise UserError(f"--processes {processes}: {world.world_size} ranks share the work; leave --processes out")
    if world.world_size > 1 and world.launcher == "torchrun":
        raise UserError("started by torchrun, whose port is taken: use mpiexec or srun, or --processes alone")
