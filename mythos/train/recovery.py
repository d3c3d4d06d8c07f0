"""Recovery from bad steps: skipped updates and loss spikes."""

from mythos.checkpoint import layout, restore
from mythos.checkpoint.saver import Saver
from mythos.config.schema import Train
from mythos.engine.engine import TrainingEngine
from mythos.errors import TrainingError
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.train.state import RunState


def recover(
    options: Train, engine: TrainingEngine, saver: Saver, watchdog: Watchdog, state: RunState, spiked: bool
) -> RunState | None:
    """Called after each step: end a run with too many bad steps, and go back after a spike. Collective.

    Returns:
        The state to continue with if the run went back to a checkpoint, else None.

    Raises:
        TrainingError: the loss or the gradient was not finite at ``train.max_bad_steps`` steps in a row, or the loss
            spiked after ``train.max_rewinds`` rewinds.
    """
    if state.bad_steps_in_a_row:
        _report_bad_step(options, saver, state)
    if not (spiked and options.spike_rewind):
        return None
    with watchdog.patience(f"going back after step {state.step}"):
        return _rewind(options, engine, saver, watchdog, state)


def _report_bad_step(options: Train, saver: Saver, state: RunState) -> None:
    in_a_row = state.bad_steps_in_a_row
    log.warning(f"step {state.step}: loss or gradient not finite, update skipped ({in_a_row} in a row)")
    if in_a_row >= options.max_bad_steps:
        saver.finish()  # a save in progress may become the newest checkpoint
        newest = layout.latest(saver.directory)
        raise TrainingError(
            f"loss or gradient not finite at {in_a_row} steps in a row (train.max_bad_steps), up to step {state.step}; "
            f"last checkpoint: {newest or 'none yet'}: lower optim.learning_rate or check the data"
        )


def _rewind(
    options: Train, engine: TrainingEngine, saver: Saver, watchdog: Watchdog, state: RunState
) -> RunState | None:
    """Go back to the newest checkpoint and leave out the data read since; None if there is no checkpoint yet."""
    saver.finish()
    if missing := saver.missing_directory():
        raise TrainingError(f"step {state.step}: cannot go back after a loss spike: {missing}")
    found = restore.newest_valid(saver.directory, watchdog.progress)
    if found is None:
        log.warning("there is no checkpoint yet to go back to: training continues")
        return None
    if state.rewinds >= options.max_rewinds:
        raise TrainingError(
            f"step {state.step}: the loss has spiked again after {state.rewinds} rewinds (train.max_rewinds); last "
            f"checkpoint: {found}: lower optim.learning_rate or check the data"
        )
    saved = RunState.from_dict(found, restore.load(engine, found, watchdog.progress))
    left_out = state.samples - saved.samples
    log.warning(f"going back to {found} at step {saved.step}; the next {left_out} sequences are left out")
    return state.rewound_to(saved)
