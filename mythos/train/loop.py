"""The training run, from the first step to the last, in the order in which things happen."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import yaml

from mythos.checkpoint import layout
from mythos.config.derive import global_batch_sequences, tokens_per_step
from mythos.config.load import flatten, to_dict
from mythos.config.schema import Config
from mythos.errors import DONE, PREEMPTED, TrainingError
from mythos.metrics.console import Progress, log, start_logging
from mythos.metrics.health import depth_metrics, expert_metrics, model_metrics
from mythos.metrics.throughput import StepClock, peak_memory_gib
from mythos.metrics.watch import CollapseWatch, LossWatch
from mythos.metrics.writer import MetricsWriter, read_metrics
from mythos.model.moe import balance, expert_load
from mythos.train import checkpoint, distributed, preflight, run_directory
from mythos.train.batch import StepBatches, draw_depths, micro_batch_plan, tokens_and_targets
from mythos.train.data import RunData, check_data_unchanged, open_data_everywhere
from mythos.train.engine import TrainingEngine, precision
from mythos.train.evaluate import sample_text, validate
from mythos.train.life import Life
from mythos.train.preemption import StopRequest
from mythos.train.saver import Saver
from mythos.train.schedule import learning_rate, muon_step
from mythos.train.watchdog import Watchdog

FRESH = {"skipped_steps": 0, "bad_steps_in_a_row": 0, "skipped_samples": 0, "rewinds": 0, "loss": {}}
"""What a run that begins has to remember, besides its weights."""


def train(config: Config, device: torch.device, stop: StopRequest, accept_changes: bool = False) -> int:
    """Train to ``train.steps``, resuming from the run directory's newest checkpoint; returns the exit code. Collective.

    Args:
        device: this rank's, from ``distributed.start``.
        stop: asks for a save and an early return.
        accept_changes: go on with a run although options that define it, or its data, have changed.

    Raises:
        UserError: the run directory or the data do not fit the configuration.
        TrainingError: the loss or the gradient stayed non-finite for ``train.max_bad_steps`` steps in a row, or the
            loss has spiked more often than ``train.max_rewinds``.
        SaveError: checkpoints could not be written, ``checkpoint.max_failures`` times in a row.
    """
    with (
        Watchdog(config.train.watchdog_s) as watchdog,
        Life(Path(config.run.directory)) as life,
        ExitStack() as cleanup,
    ):
        reports = preflight.check_ranks(config, device)
        data = open_data_everywhere(config)
        changed, lock = _open_run_directory(config, accept_changes, device, reports)
        cleanup.enter_context(lock or nullcontext())
        life.begin()
        watchdog.before_end, stop.before_leaving = life.fail, watchdog.leave
        exit_code = _train(config, device, stop, data, changed, accept_changes, watchdog, cleanup)
        life.end(exit_code)
        return exit_code


def _train(
    config: Config,
    device: torch.device,
    stop: StopRequest,
    data: RunData,
    changed: Mapping[str, Any],
    accept_changes: bool,
    watchdog: Watchdog,
    cleanup: ExitStack,
) -> int:
    directory, rank = Path(config.run.directory), dist.get_rank()
    found = checkpoint.newest_valid(directory / layout.DIRECTORY)
    watchdog.progress("building the model")
    engine = TrainingEngine(config, device)
    state: dict[str, Any] = FRESH | {"data": data.identity}
    first_step = 0
    if found is not None:
        watchdog.progress("reading the checkpoint")
        saved = checkpoint.load(engine, found)
        for change in distributed.agree(lambda: check_data_unchanged(saved["data"], data.identity, accept_changes)):
            log.warning(f"data changed: {change}; going on at sample {saved['samples']} of the new order")
        state, first_step = saved | {"data": data.identity}, saved["step"]
        log.info(f"resumed from {found} at step {first_step} of {config.train.steps}")
    if first_step >= config.train.steps:
        log.info(f"the run is finished at step {first_step}: raise train.steps (now {config.train.steps}) to go on")
        _say_where(directory)
        return DONE

    # Closed whatever happens: the last points before a failure are those that matter.
    writer = (
        cleanup.enter_context(closing(MetricsWriter(directory, first_step if found else -1))) if rank == 0 else None
    )
    if writer and (changed or not found):
        run_directory.write_config(config)
        run_directory.keep_tokenizer(directory, data.tokenizer)
        writer.write_config(yaml.safe_dump(to_dict(config), sort_keys=False), flatten(to_dict(config)))
    if found is None or distributed.from_rank_0(lambda: lacks_validation(config, first_step)):
        validate(config, engine, data.validation, first_step, writer, watchdog)
    stream = data.stream(config)
    batches = cleanup.enter_context(closing(StepBatches(config, stream, first_step + 1, state["skipped_samples"])))
    distributed.agree(batches.check)
    saver = Saver(directory / layout.DIRECTORY, config.checkpoint, engine, found, watchdog.patience)
    progress = Progress(first_step, config.train.steps, rank)
    loss_watch = LossWatch(**state["loss"])
    experts = getattr(config.model, "core_experts", None)
    collapse_watch = CollapseWatch(experts.experts_per_token, config.train.collapse_steps) if experts else None
    clock = StepClock()
    exit_code = DONE

    step = first_step
    while step < config.train.steps:
        step += 1
        clock.start()
        depths = draw_depths(config, step)
        losses, health, load = [], [], None
        with clock.waiting_for_data():
            micro_batches = batches.take(step)
        for micro_step, sequences in enumerate(micro_batches):
            tokens, targets = tokens_and_targets(sequences, device)
            loss, diagnostics = engine(tokens, targets, micro_batch_plan(config, depths, step, micro_step))
            if experts:  # before the backward pass, whose recomputation would count the tokens again
                load = expert_load(engine.module) + (0 if load is None else load)
            engine.backward(loss)
            losses.append(loss.detach())
            health.append(diagnostics)
        rate = learning_rate(config.optim, step - 1, config.train.steps)
        update = engine.step(rate, muon_step(config.optim, step - 1, config.train.steps))
        if load is not None:
            dist.all_reduce(load)
            if update.applied and experts:
                balance(engine.module, load, experts.balance_rate)

        # Everything a rank knows alone travels in one exchange, and all ranks decide on the same numbers.
        local = {"train/loss": torch.stack(losses).mean().item(), **model_metrics(health)}
        with clock.waiting_for_data():  # for the next step: what one rank cannot read, all ranks must know
            data_failed = batches.failed()
        worst = {
            "stop": float(stop.asked),
            "data_failed": float(data_failed),
            "saving": float(saver.pending),
            "perf/data_wait_seconds": clock.data_wait_seconds,
            "perf/peak_memory_gib": peak_memory_gib(device),
        }
        rows = distributed.gather([*local.values(), *worst.values()], device)
        agreed = dict(zip(local, rows.mean(dim=0).tolist(), strict=False))
        agreed |= dict(zip(worst, rows.amax(dim=0)[len(local) :].tolist(), strict=True))
        seconds = clock.seconds()
        stopping, data_failed = bool(agreed.pop("stop")), bool(agreed.pop("data_failed"))
        saver.advance(pending_anywhere=bool(agreed.pop("saving")))
        watchdog.progress(f"step {step}")
        watchdog.started()
        state["bad_steps_in_a_row"] = 0 if update.applied else state["bad_steps_in_a_row"] + 1
        state["skipped_steps"] += not update.applied
        metrics = agreed | {
            "train/learning_rate": rate,
            "train/gradient_norm": update.gradient_norm,
            "train/tokens": float(step * tokens_per_step(config)),
            "train/skipped_steps": float(state["skipped_steps"]),
            "train/rewinds": float(state["rewinds"]),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens_per_step(config) / seconds,
        }
        if config.loop is not None:
            metrics |= depth_metrics(depths, config.loop.backprop_depth)
        if load is not None:
            metrics |= expert_metrics(load)
            if collapse_watch and (warning := collapse_watch.look(load)):
                log.warning(f"step {step}: {warning}")
        metrics |= saver.metrics()

        last = step == config.train.steps
        if due(step, config.log.every) or last or not update.applied:
            progress.report(step, metrics)
            if writer:
                writer.write(step, metrics)
        spiked = False
        if not update.applied:
            report_bad_step(config, saver, step, state["bad_steps_in_a_row"])
        elif config.train.spike_sigma:
            spiked = report_spike(step, metrics["train/loss"], config.train.spike_sigma, loss_watch)
            state["loss"] = loss_watch.state()
        if spiked and config.train.spike_rewind and not (stopping or data_failed):
            with watchdog.patience(f"going back after step {step}"):
                rewound = rewind(config, engine, saver, step, state)
            if rewound is not None:
                step, state, loss_watch = rewound["step"], rewound, LossWatch(**rewound["loss"])
                batches.restart(step + 1, state["skipped_samples"])
                if writer:
                    writer.rewind(step)
                continue
        samples = step * global_batch_sequences(config) + state["skipped_samples"]
        state |= {"samples": samples, "epochs": stream.epochs(samples)}
        if stopping or data_failed:  # time may be short: save before anything else
            save(config, saver, step, state)
            saver.insist()
        elif due(step, config.checkpoint.every) and not last:
            save(config, saver, step, state)
        if data_failed:
            distributed.agree(batches.check)
        if due(step, config.eval.every) or last:
            validate(config, engine, data.validation, step, writer, watchdog)
        if last and not stopping:  # afterwards, for with it the run is finished
            save(config, saver, step, state)
        if stopping and not last:
            log.info(
                f"asked to stop ({stop.signal_name or 'on another rank'}): saved at step {step}; start again to go on"
            )
            exit_code = PREEMPTED
            break

    saver.insist()
    if writer and (rest := saver.metrics()):
        writer.write(step, rest)
    progress.close()
    if exit_code == DONE and config.sample.tokens:
        log.info(f"sample: {json.dumps(sample_text(config, engine, data.tokenizer, watchdog), ensure_ascii=False)}")
    _say_where(directory)
    return exit_code


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return step % every == 0


def lacks_validation(config: Config, step: int) -> bool:
    """Whether a life that was killed has saved at this step, but not yet validated."""
    if not due(step, config.eval.every):
        return False
    lines = read_metrics(Path(config.run.directory))
    return not any(line["step"] == step and any(name.startswith("val/") for name in line) for line in lines)


def save(config: Config, saver: Saver, step: int, state: Mapping[str, Any]) -> None:
    """Begin a checkpoint."""
    about = {"step": step, "tokens": step * tokens_per_step(config), "world": checkpoint.world_shape(saver.engine)}
    saver.start(step, {**state, **about})


def rewind(
    config: Config, engine: TrainingEngine, saver: Saver, step: int, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint after a spike at ``step``, and leave out the data of the steps since.

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
    left_out = (step - saved["step"]) * global_batch_sequences(config)
    log.warning(f"going back to {found} at step {saved['step']}; the next {left_out} sequences are left out")
    counts = {"skipped_samples": state["skipped_samples"] + left_out, "rewinds": state["rewinds"] + 1}
    return saved | counts | {"data": state["data"]}


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


def _open_run_directory(
    config: Config, accept_changes: bool, device: torch.device, reports: list[preflight.Report]
) -> tuple[dict[str, tuple[Any, Any]], TextIO | None]:
    """The options that changed since the last start, and the lock on the directory (rank 0)."""
    rank, directory = dist.get_rank(), Path(config.run.directory)
    changed = distributed.agree(lambda: run_directory.prepare(config, accept_changes) if rank == 0 else {})
    lock = distributed.agree(lambda: run_directory.lock(directory) if rank == 0 else None)
    preflight.check_run_directory(config)
    start_logging(directory, rank)
    log.info(f"rank {rank} of {len(reports)} on {reports[rank].host}, process {os.getpid()}, device {device}")
    for report in reports if rank == 0 else [reports[rank]]:
        log.info(str(report))
    if rank == 0:
        hosts = [report.host for report in reports]
        run_directory.record_environment(directory, hosts, str(device), precision(config, device))
    for path, (before, after) in changed.items():
        log.info(f"changed since the last start: {path}: {before!r} -> {after!r}")
    return changed, lock


def _say_where(directory: Path) -> None:
    tensorboard = Path(sys.executable).with_name("tensorboard")
    if tensorboard.is_relative_to(Path.cwd()):
        tensorboard = tensorboard.relative_to(Path.cwd())
    log.info(f"run directory: {directory}")
    log.info(f"watch it: {tensorboard} --logdir {directory}")
