"""Going back to a checkpoint: after a loss spike, and from a decay of the learning rates; and runs of bad steps."""

from pathlib import Path

from mythos.checkpoint import layout, restore
from mythos.checkpoint.saver import Saver
from mythos.config.schema import Train
from mythos.engine.engine import TrainingEngine
from mythos.errors import TrainingError
from mythos.plan.budgets import Course
from mythos.ranks import group
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.train.state import RunState


def undo_decay(
    course: Course, engine: TrainingEngine, checkpoints: Path, watchdog: Watchdog, state: RunState
) -> RunState:
    """Go back to the constant phase if the present decay is of no more use. Collective.

    If the checkpoint before the decay was removed, the run continues from the present weights.

    Returns:
        The state to continue with.

    Raises:
        UserError: the checkpoint is damaged.
    """
    decay = course.undone(state.position)
    if decay is None or decay.before is None:
        return state
    checkpoint = checkpoints / layout.tag(decay.before)
    with watchdog.patience(f"going back to {checkpoint.name}"):
        if not group.from_rank_0(checkpoint.is_dir):
            log.warning(f"{checkpoint}, before the decay, is missing: training continues from the decayed weights")
            state.position = state.position.without_way_back()
            return state
        restore.check(checkpoint, watchdog.progress)
        saved = RunState.from_dict(checkpoint, restore.load(engine, checkpoint, watchdog.progress))
    log.info(f"step {state.step}: back to the constant phase, to {checkpoint.name} after {decay.start} updates")
    return state.back_before_decay(saved, course)


def recover(
    options: Train,
    course: Course,
    engine: TrainingEngine,
    saver: Saver,
    watchdog: Watchdog,
    state: RunState,
    spiked: bool,
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
        return _rewind(options, course, engine, saver, watchdog, state)


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
    options: Train, course: Course, engine: TrainingEngine, saver: Saver, watchdog: Watchdog, state: RunState
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
    saved = undo_decay(course, engine, saver.directory, watchdog, saved)
    left_out = state.samples - saved.samples
    log.warning(f"going back to {found} at step {saved.step}; the next {left_out} sequences are left out")
    return state.rewound_to(saved)
