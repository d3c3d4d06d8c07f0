"""`mythos train`: bare, or once a process under torchrun, mpiexec or srun."""

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from launch.arguments import Accept, Configuration, split_configuration

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
      mythos train configs/model/tiny-looped-moe.yaml configs/run/demo.yaml parallel.expert_parallel_size=1
      torchrun --nproc-per-node=2 --no-python mythos train MODEL.yaml RUN.yaml
      mpiexec -n 2 mythos train MODEL.yaml RUN.yaml
      srun --ntasks-per-node=8 mythos train MODEL.yaml RUN.yaml

    On SIGTERM, SIGUSR1 or Ctrl-C the run saves after the current step and exits with code 85. `mythos config` prints
    every option with its meaning.
    """
    from mythos.ranks.preemption import StopRequest

    stop = StopRequest()  # before anything slow, so that a signal at any time ends in a saved run
    from mythos.config.consent import check_names
    from mythos.config.load import load

    def work(config: "Config", device: "torch.device") -> int:
        from mythos.train.loop import train  # imports DeepSpeed, which must know the device first

        return train(config, device, stop, accept or ())

    def configure(world_size: int) -> "Config":
        check_names(accept or ())
        config = load(*split_configuration(configuration), world_size)
        stop.leave_after(config.preemption.grace_s)
        return config

    return run_ranks(configure, work)


def run_ranks(configure: "Callable[[int], Config]", work: "Callable[[Config, torch.device], int]") -> int:
    """Join the other ranks and do the work; ``configure`` is given their number. Returns the exit code.

    An error is told once, by the rank that knows, and ends the process at once: see ``World`` for what follows.
    """
    from mythos.errors import FAILED, UserError
    from mythos.ranks.world import read_world
    from mythos.run.console import log, start_logging

    with read_world() as world:
        start_logging(None, world.rank)
        try:
            config = configure(world.world_size)
        except UserError as error:
            if world.rank > 0:
                _wait_for_rank_0(error.exit_code)
                log.error(f"mythos: {world.place}, but not rank 0, finds {error}")
                _leave(error.exit_code)
            raise
        log.info(world.describe())
        world.export()
        from mythos.ranks import group
        from mythos.ranks.watchdog import PATIENCE_S

        try:  # the watchdog knows more to tell than a collective that gives up: it comes first
            timeout_s = group.COLLECTIVE_TIMEOUT_S + max(config.train.watchdog_s, PATIENCE_S)
            exit_code = work(config, group.start(config.device, timeout_s))
            group.finish()
            return exit_code
        except UserError as error:
            if world.rank > 0 and error.agreed:
                _wait_for_rank_0(error.exit_code)
            else:
                log.error(f"mythos: {error}" if error.agreed else f"mythos: {world.place}: {error}")
            _leave(error.exit_code)
        except OSError as error:
            log.error(f"mythos: {world.place}: {error}; what is saved is intact: start again to go on")
            _leave(FAILED)
        except Exception:
            log.exception(f"mythos: {world.place} failed")
            _leave(FAILED)


def _leave(exit_code: int) -> NoReturn:
    """End a failed process at once: the threads of its process group, whose other ranks may be gone, would abort it."""
    logging.shutdown()
    os._exit(exit_code)


def _wait_for_rank_0(exit_code: int) -> None:
    """Every rank has found the same mistake. Rank 0 reports it and fails; the launcher then ends this process.

    With the same exit code, for srun passes on the largest of all.
    """
    signal.set_wakeup_fd(-1)  # which would leave with the code of a preemption
    signal.signal(signal.SIGTERM, lambda *_: _leave(exit_code))
    time.sleep(LAUNCHER_GRACE_S)
