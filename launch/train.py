"""`mythos train`: one process, or many under torchrun, mpiexec or srun."""

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import Accept, Configuration
from mythos.config.arguments import split_arguments

if TYPE_CHECKING:  # imported only when needed, so that a mistake in the configuration is reported without delay
    import torch

    from mythos.config.schema import Config

LAUNCHER_GRACE_S = 3


def run(
    configuration: Configuration,
    accept: Accept = None,
) -> int:
    """Train a model, or resume its run.

    A run resumes from the newest valid checkpoint in its run directory. The same command runs bare (one process) and
    under torchrun, mpiexec and srun:

    \b
      mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml
      torchrun --nproc-per-node=2 --no-python mythos train MODEL.yaml RUN.yaml
      mpiexec -n 2 mythos train MODEL.yaml RUN.yaml
      srun --ntasks-per-node=8 mythos train MODEL.yaml RUN.yaml

    On SIGTERM, SIGUSR1, Ctrl-C or a closed terminal (unless started with nohup) the run saves after the current step
    and exits with code 85. `mythos config` prints every option with its meaning.
    """
    from mythos.ranks.preemption import StopRequest

    stop = StopRequest()  # before anything slow, so that a signal is handled at any time
    from mythos.config.consent import check_names
    from mythos.config.load import load
    from mythos.config.references import Reference, references
    from mythos.run.find import is_run
    from mythos.run.paths import found_from_here

    known: dict[str, Reference] = {}

    def work(config: "Config", device: "torch.device") -> int:
        from mythos.train.loop import train  # imports DeepSpeed, so the device must be set first

        return train(config, device, stop, accept or (), known)

    def configure(world_size: int) -> "Config":
        check_names(accept or ())
        files, overrides = split_arguments(configuration)
        known.update(references(files, overrides))
        config = load(files, overrides, world_size)
        if files and is_run(directory := Path(files[0]).parent):  # a run's own config.yaml
            config = found_from_here(config, directory, overrides)
        stop.exit_after(config.preemption.grace_s)
        return config

    def journal(config: "Config", rank: int) -> AbstractContextManager[object]:
        from mythos.run.journal import Journal

        return Journal(Path(config.run.directory), rank)

    return run_ranks(configure, work, journal)


def run_ranks(
    configure: "Callable[[int], Config]",
    work: "Callable[[Config, torch.device], int]",
    journal: "Callable[[Config, int], AbstractContextManager[object]]" = lambda config, rank: nullcontext(),
) -> int:
    """Join the other ranks and do the work; returns the exit code.

    An error is reported once, by rank 0 or by the only rank that knows of it, and ends the process. ``World``
    describes how the launcher then ends the other ranks.

    Args:
        configure: loads the configuration for the number of ranks.
        work: called with the configuration and this rank's device.
        journal: called with the configuration and the rank; records an error before ``work`` is called.
    """
    from mythos.errors import FAILED, UserError
    from mythos.ranks.exits import exit_now
    from mythos.ranks.world import read_world
    from mythos.run.console import log, start_logging

    with read_world() as world:
        start_logging(None, world.rank)
        try:
            config = configure(world.world_size)
        except UserError as error:
            if world.rank > 0:
                _wait_for_rank_0(error.exit_code)
                log.error(f"mythos: {world.place} has an error that rank 0 does not have: {error}")
                exit_now(error.exit_code)
            raise
        log.info(world.describe())
        world.export()
        from mythos.ranks import group
        from mythos.ranks.determinism import compute_deterministically
        from mythos.ranks.preflight import check_ranks

        try:
            with journal(config, world.rank):
                device = group.start(config.device, world, functools.partial(check_ranks, config))
                if config.deterministic and device.type == "cuda":
                    compute_deterministically(os.environ)
            exit_code = work(config, device)
            group.finish()
            return exit_code
        except UserError as error:
            if world.rank > 0 and error.agreed:
                _wait_for_rank_0(error.exit_code)
            else:
                log.error(f"mythos: {error}" if error.agreed else f"mythos: {world.place}: {error}")
            exit_now(error.exit_code)
        except OSError as error:
            log.error(f"mythos: {world.place}: {error}; the last complete checkpoint is intact: start again to resume")
            exit_now(FAILED)
        except Exception:
            log.exception(f"mythos: {world.place} failed")
            exit_now(FAILED)


def _wait_for_rank_0(exit_code: int) -> None:
    """Wait for the launcher to end this process, after an error that rank 0 reports.

    The SIGTERM of the launcher ends it with the error's own exit code, because srun returns the largest one.
    """
    from mythos.ranks.exits import exit_now

    signal.set_wakeup_fd(-1)  # so that this SIGTERM does not count as a preemption
    signal.signal(signal.SIGTERM, lambda *_: exit_now(exit_code))
    time.sleep(LAUNCHER_GRACE_S)
