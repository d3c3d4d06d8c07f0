"""The training run, from the first step to the last, in the order in which things happen."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from mythos.checkpoint.saver import Saver
from mythos.checkpoint.snapshot import world_shape
from mythos.config.derive import global_batch_sequences, tokens_per_step
from mythos.config.references import NO_REFERENCES, Reference
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import DONE, PREEMPTED
from mythos.plan.schedule import learning_rate, schedule
from mythos.ranks import group
from mythos.ranks.preemption import StopRequest
from mythos.run.console import log
from mythos.train.batch import StepBatch, StepBatches, model_flops
from mythos.train.recovery import recover, undo_decay
from mythos.train.start import OpenRun, open_run
from mythos.train.state import RunState
from mythos.train.step import StepResult, StepVotes, balance_experts, exchange, train_step


def train(
    config: Config,
    device: torch.device,
    stop: StopRequest,
    accept: Sequence[str] = (),
    known: Mapping[str, Reference] = NO_REFERENCES,
) -> int:
    """Train to ``train.steps``, resuming from the run directory's newest checkpoint; returns the exit code. Collective.

    Args:
        device: this rank's, from ``group.start``.
        stop: asks for a save and an early return.
        accept: options that may have changed since the run was started, as dotted paths; the data behind them, too.
        known: the values that come from the environment, which the run's files do not hold.

    Raises:
        UserError: the run directory or the data do not fit the configuration.
        TrainingError: the loss or the gradient stayed non-finite for ``train.max_bad_steps`` steps in a row, or the
            loss has spiked more often than ``train.max_rewinds``.
        SaveError: checkpoints could not be written, ``checkpoint.max_failures`` times in a row.
    """
    with open_run(config, device, stop, accept, known) as run:
        engine = TrainingEngine(config, device)
        state = run.restore(engine)
        unvalidated = run.missing_validation(state)
        if run.course.target(state.position) is None and not unvalidated:
            log.info(
                f"the run is finished at step {state.step}: raise train.steps (now {config.train.steps}) to continue"
            )
            return run.end(DONE)
        stopped, state = _train(run, engine, state, unvalidated)
        if stopped:
            return run.end(PREEMPTED)
        if run.course.target(state.position) is not None:
            log.info(f"paused at step {state.step} (train.stop_at): raise it, or set it to null, to continue")
            return run.end(DONE, f"after {state.updates} steps (train.stop_at)")
        if config.sample.tokens:
            sample = run.sample(engine)
            log.info(
                "no sample: stop requested" if sample is None else f"sample: {json.dumps(sample, ensure_ascii=False)}"
            )
        return run.end(DONE)


def _train(run: OpenRun, engine: TrainingEngine, state: RunState, unvalidated: bool) -> tuple[bool, RunState]:
    """Run the remaining steps and save; returns whether a stop was requested before the last one, and the state."""
    config, course = run.config, run.course
    with closing(run.open_batches(state)) as batches, closing(run.open_report(state)) as report:
        # If a stop is requested during a validation, all ranks abandon it; the next start repeats it.
        stopping = unvalidated and not run.validate(engine, state, report)
        saver = Saver(run.directory.checkpoints, config.checkpoint, engine, run.found, run.watchdog.patience, run.lock)

        while (budget := course.target(state.position)) is not None and not (stopping or run.is_paused(state)):
            if course.undone(state.position):
                saver.wait_until_saved()
                state = undo_decay(course, engine, saver.directory, run.watchdog, state)
                batches.restart(state.updates + 1, state.samples)
            state.position = course.begin_decay(state.position)
            started = time.perf_counter()
            batch = batches.take()
            rate = learning_rate(config.optim, state.updates, budget)
            result = train_step(engine, batch, schedule(config.optim, state.updates, budget))
            votes = exchange(result, run.stop, batches, saver, engine.device)
            balance_experts(engine, config.model, result, votes)
            count(state, config, batch, votes, result)
            run.watchdog.progress(f"step {state.step}")
            run.watchdog.started()
            seconds = time.perf_counter() - started

            saver.advance(pending_anywhere=votes.saving)
            last = run.is_paused(state) or state.position.is_decayed or course.target(state.position) is None
            spiked = report.step(state, batch, result, votes, rate, seconds, saver.metrics(), last)
            rewound = recover(config.train, course, engine, saver, run.watchdog, state, spiked)
            if rewound is not None:
                state = rewound
                batches.restart(state.updates + 1, state.samples)
                report.rewind(state)

            stopping, decays = votes.stop, course.begins_decay(state.position)
            save_due = (decays or due(state.step, config.checkpoint.every)) and rewound is None
            if stopping or votes.data_failed:  # time may be short: save before anything else
                save(saver, batches, state)
                saver.wait_until_saved()
            elif save_due and not last:
                save(saver, batches, state)
                if decays:  # the run comes back to this checkpoint
                    saver.wait_until_saved()
            if votes.data_failed or rewound is not None:
                group.agree(batches.check)
            if not stopping and rewound is None and (due(state.step, config.eval.every) or last):
                stopping = not run.validate(engine, state, report)
                # The last checkpoint is saved after its validation, because it marks the run as finished.
                if last or (stopping and not save_due):
                    save(saver, batches, state)

        saver.wait_until_saved()
        report.write(state, saver.metrics())
    run.stop.saved = True
    if stopping:
        outcome = f"saved at step {state.step}" if state.step else "before the first step"
        signal_name = run.stop.signal_name or "on another rank"
        log.info(f"stop requested ({signal_name}): {outcome}; start again to resume")
    return stopping, state


def count(state: RunState, config: Config, batch: StepBatch, votes: StepVotes, result: StepResult) -> None:
    """Count a finished step in the state."""
    sequences, flops = global_batch_sequences(config), model_flops(config, batch.depths)
    state.count(sequences, tokens_per_step(config), votes.text_tokens, flops, result.applied)


def due(step: int, every: int) -> bool:
    """Whether an action that is done every ``every`` steps is due after this step."""
    return step % every == 0


def save(saver: Saver, batches: StepBatches, state: RunState) -> None:
    """Begin a checkpoint."""
    state.epochs = batches.epochs(state.samples)
    saver.start(state.step, state.to_dict() | {"world": world_shape(saver.engine)}, state.position.kept)
