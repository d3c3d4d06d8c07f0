"""The start of a training run: preflight checks, data, run directory, journal, watchdog, and the resumed state."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mythos.checkpoint import restore
from mythos.checkpoint.initial import load_initial_weights
from mythos.config.derive import eval_depths, expert_parallel_size
from mythos.config.references import Reference
from mythos.config.schema import Config
from mythos.data.open import RunData, check_data_unchanged
from mythos.engine.engine import TrainingEngine
from mythos.engine.sections import precision, training_dtype
from mythos.errors import BAD_INPUT, UserError
from mythos.eval.sample import sample_text
from mythos.eval.validation import validate
from mythos.hardware import peak_of_all_ranks
from mythos.plan.budgets import Course, course_of
from mythos.ranks import group, preflight
from mythos.ranks.fit import device_of_each_rank, plan_run
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run import directory as run_directory
from mythos.run.console import log, start_logging
from mythos.run.directory import RunDirectory
from mythos.run.journal import Journal, environment, has_open_attempt
from mythos.run.lock import RunLock, take
from mythos.run.metrics import iterate_metrics
from mythos.run.planned import write_measured
from mythos.train.batch import StepBatches
from mythos.train.report import Report
from mythos.train.state import RunState


@dataclass(frozen=True)
class OpenRun:
    """What one attempt needs in addition to engine and state."""

    config: Config
    stop: StopRequest
    directory: RunDirectory
    data: RunData
    changed: Mapping[str, Any]
    """Options that differ from the start before, with the old and the new value."""
    accept: Sequence[str]
    known: Mapping[str, Reference]
    """The values that come from the environment."""
    found: Path | None
    """The checkpoint to resume from."""
    watchdog: Watchdog
    journal: Journal
    run_id: str
    lock: RunLock | None
    """Of the run directory; on rank 0 only."""
    peak_flops_per_second: float
    """Of all ranks."""

    def restore(self, engine: TrainingEngine) -> RunState:
        """The state to start from; the engine is filled from the checkpoint, if there is one. Collective.

        Raises:
            UserError: the checkpoint is of another run or model, or the data has changed and the user has not accepted
                it.
        """
        if self.found is None:
            if self.config.train.initial_weights is not None:
                load_initial_weights(engine, self.config.train, self.watchdog.progress)
            return RunState(self.data.identity, self.run_id, text_tokens=0, flops=0.0)
        state = RunState.from_dict(self.found, restore.load(engine, self.found, self.watchdog.progress))
        if state.run_id not in ("", self.run_id):
            raise UserError(
                f"{self.found}: of another run ({state.run_id}, this directory's run_id is {self.run_id}): move it out "
                "of this directory",
                agreed=True,
            )
        state.run_id = self.run_id
        for change in group.agree(lambda: check_data_unchanged(state.data, self.data.identity, self.accept)):
            log.warning(f"data changed: {change}; resuming at sample {state.samples}")
        state.data = self.data.identity
        if passed := self.course.passed(state.position):
            raise UserError(
                f"train.budgets: {passed[0]}: the run has trained for {state.updates} steps without a decay to it: "
                "leave it out",
                agreed=True,
            )
        log.info(f"resumed from {self.found} at step {state.step} of {self.course.last_step(state.position)}")
        return state

    @property
    def course(self) -> Course:
        """The budgets of the run."""
        return course_of(self.config)

    def is_paused(self, state: RunState) -> bool:
        """Whether the run has reached ``train.stop_at``."""
        return self.config.train.stop_at is not None and state.updates >= self.config.train.stop_at

    def open_report(self, state: RunState) -> Report:
        """The report of this attempt. From here on the run directory describes this configuration."""
        last_step, resumed = self.course.last_step(state.position), state if self.found else None
        report = Report(self.config, dist.get_rank(), resumed, last_step, self.peak_flops_per_second)
        if dist.get_rank() == 0 and (self.changed or not self.found):
            run_directory.write_config(self.config, self.known)
            run_directory.keep_tokenizer(self.directory.path, self.data.tokenizer)
            report.write_config(self.known)
        return report

    def open_batches(self, state: RunState) -> StepBatches:
        """The batches from the state's position on; the rows of the first one have been read. Collective.

        Raises:
            UserError: a rank cannot read its rows.
        """
        batches = StepBatches(self.config, self.data.stream(), state.updates + 1, state.samples)
        try:
            group.agree(batches.check)
        except UserError:
            batches.close()
            raise
        return batches

    def missing_validation(self, state: RunState) -> bool:
        """Whether this step still needs its validation: at the start of a run, or after a stop or kill. Collective."""
        if self.found is None:
            return True
        is_last = state.position.is_decayed or self.course.target(state.position) is None or self.is_paused(state)
        if state.step % self.config.eval.every and not is_last:
            return False
        return group.from_rank_0(lambda: not _has_validation(self.directory.path, state.step))

    def validate(self, engine: TrainingEngine, state: RunState, report: Report) -> bool:
        """Measure and report the validation losses; False if a stop was requested meanwhile. Collective."""
        found = validate(engine, self.data.validation, self.config, state.step, self.watchdog, self.stop)
        if found is not None:
            report.validation(state, found)
        return found is not None

    def sample(self, engine: TrainingEngine) -> str | None:
        """Generated text; None if a stop was requested meanwhile. Collective."""
        depths = eval_depths(self.config)
        return sample_text(
            engine,
            self.data.tokenizer,
            self.data.bos,
            self.config.sample,
            self.config.eval,
            longest=self.config.data.sequence_length,
            depth=max(depths) if depths else None,
            seed=self.config.seed,
            watchdog=self.watchdog,
            stop=self.stop,
        )

    def end(self, exit_code: int, pause: str | None = None) -> int:
        """Record the end of the attempt, and print where its results are; returns the exit code."""
        if dist.get_rank() == 0:
            with suppress(OSError, UserError):  # the run is complete without these figures
                write_measured(self.directory.path)
        tensorboard = Path(sys.executable).with_name("tensorboard")
        with suppress(ValueError, OSError):  # it is elsewhere, or the working directory has been removed
            tensorboard = tensorboard.relative_to(Path.cwd())
        log.info(f"run directory: {self.directory.path}")
        log.info(f"watch it: {tensorboard} --logdir {self.directory.path}")
        self.journal.end(exit_code, pause)
        return exit_code


@contextmanager
def open_run(
    config: Config,
    device: torch.device,
    stop: StopRequest,
    accept: Sequence[str],
    known: Mapping[str, Reference],
) -> Iterator[OpenRun]:
    """Open data and run directory, and watch the run until the block ends.

    The end of the block and its cause are recorded in the run's journal. Collective.

    Raises:
        UserError: the run directory or the data do not fit the configuration.
    """
    directory = RunDirectory(Path(config.run.directory))
    journal = Journal(directory.path, dist.get_rank())
    stop.has_begun = True
    # The journal is the outer context: when a rank fails only because another rank died, it records the watchdog's
    # diagnosis, not the secondary error.
    with journal, Watchdog(config.train.watchdog_s, journal) as watchdog, ExitStack() as cleanup:
        stop.watchdog = watchdog
        reports = preflight.gather_reports(config, device)
        data = preflight.open_data_everywhere(config)
        changed, lock = _open_directory(config, accept, known, device, reports)
        if lock is not None:
            cleanup.enter_context(lock)
            lock.keep(lambda cause: watchdog.end_run(cause, BAD_INPUT))
        run_id = group.from_rank_0(lambda: lock.run_id if lock else "")
        hosts = [report.host for report in reports]
        # Only rank 0 records the environment, whose commit is looked up on a file system that all ranks may share.
        started = (str(device), precision(config, device), expert_parallel_size(config, hosts))
        journal.start(environment(hosts, *started) if dist.get_rank() == 0 else {})
        found = restore.newest_valid(directory.checkpoints, watchdog.progress)
        peak = peak_of_all_ranks(config.perf.peak_flops_per_second, device, training_dtype(config, device))
        watchdog.progress("building the model")
        yield OpenRun(
            config, stop, directory, data, changed, accept, known, found, watchdog, journal, run_id, lock, peak
        )


def _open_directory(
    config: Config,
    accept: Sequence[str],
    known: Mapping[str, Reference],
    device: torch.device,
    reports: list[preflight.RankReport],
) -> tuple[dict[str, tuple[Any, Any]], RunLock | None]:
    """The options that changed since the last start, and the lock on the directory (rank 0)."""
    rank, directory = dist.get_rank(), Path(config.run.directory)
    changed = group.agree(lambda: run_directory.prepare(config, accept, known) if rank == 0 else {})
    lock = group.agree(lambda: take(directory, has_open_attempt(directory)) if rank == 0 else None)
    preflight.check_run_directory(config)
    start_logging(RunDirectory(directory).log(rank), rank)
    log.info(f"rank {rank} of {dist.get_world_size()} on {reports[0].host}, process {os.getpid()}, device {device}")
    for report in reports:
        log.info(str(report))
    devices = device_of_each_rank(device)
    if rank == 0:
        plan_run(config, [report.host for report in reports], devices)
    for path, (before, after) in changed.items():
        log.info(f"changed since the last start: {path}: {before!r} -> {after!r}")
    return changed, lock


def _has_validation(directory: Path, step: int) -> bool:
    lines = iterate_metrics(directory)
    return any(line["step"] == step and any(name.startswith("val/") for name in line) for line in lines)
