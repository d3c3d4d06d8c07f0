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

from mythos.checkpoint import restore as checkpoint
from mythos.checkpoint.saver import Saver
from mythos.checkpoint.snapshot import world_shape
from mythos.config.derive import global_batch_sequences, tokens_per_step
from mythos.config.load import flatten, to_dict
from mythos.config.schema import Config
from mythos.data.open import RunData, check_data_unchanged
from mythos.engine.engine import TrainingEngine
from mythos.engine.schedule import learning_rate, schedule
from mythos.engine.sections import precision
from mythos.errors import DONE, PREEMPTED
from mythos.eval.validation import sample_text, validate
from mythos.model.moe import balance, expert_load
from mythos.ranks import group, preflight
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run import directory as run_directory
from mythos.run.anomalies import CollapseWatch, LossWatch
from mythos.run.console import Progress, log, start_logging
from mythos.run.health import depth_metrics, expert_metrics, model_metrics
from mythos.run.journal import Journal, environment
from mythos.run.metrics import MetricsWriter, read_metrics
from mythos.run.throughput import StepClock, peak_memory_gib
from mythos.train.batch import StepBatches, draw_depths, micro_batch_plan, tokens_and_targets
from mythos.train.recovery import report_bad_step, report_spike, rewind

FRESH = {"samples": 0, "tokens": 0, "skipped_steps": 0, "bad_steps_in_a_row": 0, "rewinds": 0, "loss": {}}
"""What a run that begins has to remember, besides its weights."""


def train(config: Config, device: torch.device, stop: StopRequest, accept_changes: bool = False) -> int:
    """Train to ``train.steps``, resuming from the run directory's newest checkpoint; returns the exit code. Collective.

    Args:
        device: this rank's, from ``group.start``.
        stop: asks for a save and an early return.
        accept_changes: go on with a run although options that define it, or its data, have changed.

    Raises:
        UserError: the run directory or the data do not fit the configuration.
        TrainingError: the loss or the gradient stayed non-finite for ``train.max_bad_steps`` steps in a row, or the
            loss has spiked more often than ``train.max_rewinds``.
        SaveError: checkpoints could not be written, ``checkpoint.max_failures`` times in a row.
    """
    with Journal(Path(config.run.directory), dist.get_rank()) as journal:
        reports = preflight.check_ranks(config, device)
    stop.has_begun = True
    # The journal is the outer context: when a rank fails only because another rank died, it records the watchdog's
    # diagnosis, not the secondary error.
    with journal, Watchdog(config.train.watchdog_s) as watchdog, ExitStack() as cleanup:
        data = preflight.open_data_everywhere(config)
        changed, lock = _open_run_directory(config, accept_changes, device, reports)
        cleanup.enter_context(lock or nullcontext())
        journal.start(environment([report.host for report in reports], str(device), precision(config, device)))
        watchdog.before_end, stop.before_leaving = journal.fail, watchdog.leave
        exit_code = _train(config, device, stop, data, changed, accept_changes, watchdog, cleanup)
        journal.end(exit_code)
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
    checkpoints = run_directory.RunDirectory(directory).checkpoints
    found = checkpoint.newest_valid(checkpoints)
    watchdog.progress("building the model")
    engine = TrainingEngine(config, device)
    state: dict[str, Any] = FRESH | {"data": data.identity}
    first_step = 0
    if found is not None:
        watchdog.progress("reading the checkpoint")
        saved = checkpoint.load(engine, found)
        for change in group.agree(lambda: check_data_unchanged(saved["data"], data.identity, accept_changes)):
            log.warning(f"data changed: {change}; going on at sample {saved['samples']}")
        state, first_step = saved | {"data": data.identity}, saved["step"]
        log.info(f"resumed from {found} at step {first_step} of {config.train.steps}")
    unvalidated = found is None or group.from_rank_0(lambda: lacks_validation(config, first_step))
    if first_step >= config.train.steps and not unvalidated:
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
    # Asked to stop meanwhile, all ranks leave the validation, and what it lacks is done by the next life.
    stopping = unvalidated and validate(config, engine, data.validation, first_step, writer, watchdog, stop) is None
    stream = data.stream(config)
    batches = cleanup.enter_context(closing(StepBatches(config, stream, first_step + 1, state["samples"])))
    group.agree(batches.check)
    saver = Saver(checkpoints, config.checkpoint, engine, found, watchdog.patience)
    progress = Progress(first_step, config.train.steps, rank)
    loss_watch = LossWatch(**state["loss"])
    experts = getattr(config.model, "core_experts", None)
    collapse_watch = CollapseWatch(experts.experts_per_token, config.train.collapse_steps) if experts else None
    clock = StepClock()
    exit_code = DONE

    step = first_step
    while step < config.train.steps and not stopping:
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
        update = engine.step(schedule(config.optim, step - 1, config.train.steps))
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
        rows = group.gather([*local.values(), *worst.values()], device)
        agreed = dict(zip(local, rows.mean(dim=0).tolist(), strict=False))
        agreed |= dict(zip(worst, rows.amax(dim=0)[len(local) :].tolist(), strict=True))
        seconds = clock.seconds()
        stopping, data_failed = bool(agreed.pop("stop")), bool(agreed.pop("data_failed"))
        saver.advance(pending_anywhere=bool(agreed.pop("saving")))
        watchdog.progress(f"step {step}")
        watchdog.started()
        state["bad_steps_in_a_row"] = 0 if update.applied else state["bad_steps_in_a_row"] + 1
        state["skipped_steps"] += not update.applied
        state["samples"] += global_batch_sequences(config)
        state["tokens"] += tokens_per_step(config)
        metrics = agreed | {
            "train/learning_rate": learning_rate(config.optim, step - 1, config.train.steps),
            "train/gradient_norm": update.gradient_norm,
            "train/tokens": float(state["tokens"]),
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
        of_saves = saver.metrics()

        if due(step, config.log.every) or step == config.train.steps or not update.applied:
            progress.report(step, metrics)
            if writer:
                writer.write(step, metrics | of_saves)
        elif writer and of_saves:
            writer.write(step, of_saves)
        spiked = False
        if not update.applied:
            report_bad_step(config, saver, step, state["bad_steps_in_a_row"])
        elif config.train.spike_sigma:
            spiked = report_spike(step, metrics["train/loss"], config.train.spike_sigma, loss_watch)
            state["loss"] = loss_watch.state()
        rewound = None
        if spiked and config.train.spike_rewind:
            with watchdog.patience(f"going back after step {step}"):
                rewound = rewind(config, engine, saver, step, state)
        if rewound is not None:
            step, state, loss_watch = rewound["step"], rewound, LossWatch(**rewound["loss"])
            batches.restart(step + 1, state["samples"])
            if writer:
                writer.rewind(step)
        state["epochs"] = stream.epochs(state["samples"])
        last = step == config.train.steps
        if stopping or data_failed:  # time may be short: save before anything else
            save(saver, step, state)
            saver.wait_until_saved()
        elif due(step, config.checkpoint.every) and not last and rewound is None:
            save(saver, step, state)
        if data_failed or rewound is not None:
            group.agree(batches.check)
        if not stopping and rewound is None and (due(step, config.eval.every) or last):
            stopping = validate(config, engine, data.validation, step, writer, watchdog, stop) is None
            # The last one afterwards, for with it the run is finished.
            if last or (stopping and not due(step, config.checkpoint.every)):
                save(saver, step, state)

    saver.wait_until_saved()
    stop.saved = True
    if stopping:
        outcome = f"saved at step {step}" if step else "before the first step"
        log.info(f"asked to stop ({stop.signal_name or 'on another rank'}): {outcome}; start again to go on")
        exit_code = PREEMPTED
    if writer and (rest := saver.metrics()):
        writer.write(step, rest)
    progress.close()
    if exit_code == DONE and config.sample.tokens:
        sample = sample_text(config, engine, data.tokenizer, watchdog, stop)
        log.info("no sample: asked to stop" if sample is None else f"sample: {json.dumps(sample, ensure_ascii=False)}")
    _say_where(directory)
    return exit_code


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return step % every == 0


def lacks_validation(config: Config, step: int) -> bool:
    """Whether a life that was stopped or killed has saved at this step, but not yet validated."""
    if not (due(step, config.eval.every) or step >= config.train.steps):
        return False
    lines = read_metrics(Path(config.run.directory))
    return not any(line["step"] == step and any(name.startswith("val/") for name in line) for line in lines)


def save(saver: Saver, step: int, state: Mapping[str, Any]) -> None:
    """Begin a checkpoint."""
    saver.start(step, {**state, "step": step, "world": world_shape(saver.engine)})


def _open_run_directory(
    config: Config, accept_changes: bool, device: torch.device, reports: list[preflight.RankReport]
) -> tuple[dict[str, tuple[Any, Any]], TextIO | None]:
    """The options that changed since the last start, and the lock on the directory (rank 0)."""
    rank, directory = dist.get_rank(), Path(config.run.directory)
    changed = group.agree(lambda: run_directory.prepare(config, accept_changes) if rank == 0 else {})
    lock = group.agree(lambda: run_directory.lock(directory) if rank == 0 else None)
    preflight.check_run_directory(config.run, config.model)
    start_logging(run_directory.RunDirectory(directory).log(rank), rank)
    log.info(f"rank {rank} of {dist.get_world_size()} on {reports[0].host}, process {os.getpid()}, device {device}")
    for report in reports:
        log.info(str(report))
    for path, (before, after) in changed.items():
        log.info(f"changed since the last start: {path}: {before!r} -> {after!r}")
    return changed, lock


def _say_where(directory: Path) -> None:
    tensorboard = Path(sys.executable).with_name("tensorboard")
    if tensorboard.is_relative_to(Path.cwd()):
        tensorboard = tensorboard.relative_to(Path.cwd())
    log.info(f"run directory: {directory}")
    log.info(f"watch it: {tensorboard} --logdir {directory}")
