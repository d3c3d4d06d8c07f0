"""What a run does about steps that went wrong: updates that were skipped, and losses that spike."""

from collections.abc import Mapping
from typing import Any

from mythos.checkpoint import layout
from mythos.checkpoint import restore as checkpoint
from mythos.checkpoint.saver import Saver
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import TrainingError
from mythos.run.anomalies import LossWatch
from mythos.run.console import log


def rewind(
    config: Config, engine: TrainingEngine, saver: Saver, step: int, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint after a spike at ``step``, and leave out the data that was read since.

    Returns:
        The state to go on with, or None where there is no checkpoint yet. Collective.

    Raises:
        TrainingError: this is one spike more than ``train.max_rewinds``.
    """
    saver.finish()
    found = checkpoint.newest_valid(saver.directory)
    if found is None:
        log.warning("no checkpoint to go back to yet: going on")
        return None
    if state["rewinds"] >= config.train.max_rewinds:
        raise TrainingError(
            f"step {step}: the loss has spiked again after {state['rewinds']} rewinds (train.max_rewinds); last "
            f"checkpoint: {found}: lower optim.learning_rate or look at the data"
        )
    saved = checkpoint.load(engine, found)
    left_out = state["samples"] - saved["samples"]
    log.warning(f"going back to {found} at step {saved['step']}; the next {left_out} sequences are left out")
    return saved | {"samples": state["samples"], "rewinds": state["rewinds"] + 1, "data": state["data"]}


def report_spike(step: int, loss: float, sigma: float, watch: LossWatch) -> bool:
    """Tell of a loss far above its running mean, and take it into that mean; whether it was one."""
    deviations = watch.deviations(loss)
    watch.learn(loss, sigma)
    if deviations > sigma:
        log.warning(f"step {step}: loss {loss:.4f} is a spike, {deviations:.1f} standard deviations above its mean")
    return deviations > sigma


def report_bad_step(config: Config, saver: Saver, step: int, in_a_row: int) -> None:
    """Tell of a skipped update; end the run when there were too many in a row."""
    log.warning(f"step {step}: loss or gradient not finite, update skipped ({in_a_row} in a row)")
    if in_a_row >= config.train.max_bad_steps:
        saver.finish()  # what is under way counts
        newest = layout.latest(saver.directory)
        raise TrainingError(
            f"loss or gradient not finite at {in_a_row} steps in a row (train.max_bad_steps), up to step {step}; "
            f"last checkpoint: {newest or 'none yet'}: lower optim.learning_rate or look at the data"
        )
