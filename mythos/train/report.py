"""The report of a run: console, metrics.jsonl, TensorBoard, and the watches for spikes and collapse.

docs/metrics.md defines every metric. To add one, put it into ``Report.step`` (values that are the same on all ranks)
or into the diagnostics that the model returns (means over micro batches and ranks; absent if nothing was measured).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from mythos.config.derive import tokens_per_step
from mythos.config.references import Reference, with_references
from mythos.config.schema import Config
from mythos.config.yaml_file import dump
from mythos.drawing import pixels
from mythos.errors import UserError, masked
from mythos.eval.pictures import validation_pictures
from mythos.eval.validation import Validation
from mythos.run.anomalies import CollapseWatch
from mythos.run.console import Progress, log
from mythos.run.hparams import hparams
from mythos.run.metrics import MetricsWriter
from mythos.run.planned import read_planned
from mythos.run.tensorboard import CurvePosition
from mythos.train.batch import StepBatch, model_flops
from mythos.train.state import RunState
from mythos.train.step import StepResult, StepVotes


class Report:
    """Reports each step. Every rank has one, and all detect the same spikes; only rank 0 writes files.

    Args:
        resumed: the state that was resumed; later metrics of an attempt that was killed are dropped. None at the start
            of a run.
        last_step: of the whole run.
        peak_flops_per_second: of all ranks.
    """

    def __init__(
        self, config: Config, rank: int, resumed: RunState | None, last_step: int, peak_flops_per_second: float
    ) -> None:
        self._config, self._peak_flops_per_second = config, peak_flops_per_second
        directory = Path(config.run.directory)
        self._writer = (
            MetricsWriter(directory, resumed.curve_position if resumed else CurvePosition()) if rank == 0 else None
        )
        self._progress = Progress(resumed.step if resumed else 0, last_step, rank)
        experts = getattr(config.model, "core_experts", None)
        self._collapse = CollapseWatch(experts.experts_per_token, config.train.collapse_steps) if experts else None

    def write_config(self, known: Mapping[str, Reference]) -> None:
        """Show the configuration in TensorBoard."""
        if self._writer:
            self._writer.write_config(masked(dump(with_references(self._config, known))), hparams(self._config))

    def step(
        self,
        state: RunState,
        batch: StepBatch,
        result: StepResult,
        votes: StepVotes,
        learning_rate: float,
        seconds: float,
        of_saves: Mapping[str, float],
        last: bool,
    ) -> bool:
        """Report a finished step and add its loss to the statistics in ``state``; returns whether it is a spike.

        Args:
            seconds: wall time of the step.
            of_saves: metrics of checkpoints, written whatever ``log.every`` is.
            last: the step is the last one of the run, or of a decay.
        """
        metrics = {
            **votes.measured,
            "perf/data_wait_seconds": votes.data_wait_seconds,
            "perf/peak_memory_gib": votes.peak_memory_gib,
            "train/learning_rate": learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "train/tokens": float(state.tokens),
            "train/skipped_steps": float(state.skipped_steps),
            "train/rewinds": float(state.rewinds),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens_per_step(self._config) / seconds,
            **flops_metrics(self._config, batch.depths, seconds, self._peak_flops_per_second),
        }
        if state.flops is not None:
            metrics["train/flops"] = state.flops
        if state.updates < state.step:
            metrics["train/updates"] = float(state.updates)
        if state.text_tokens is not None:
            metrics["train/text_tokens"] = float(state.text_tokens)
        if self._config.loop is not None:
            metrics |= depth_metrics(batch.depths, self._config.loop.backprop_depth)
        if votes.load_LE is not None:
            metrics |= expert_metrics(votes.load_LE)
            if self._collapse and (warning := self._collapse.update(votes.load_LE)):
                log.warning(f"step {state.step}: {warning}")
        train, step = self._config.train, state.step
        if step % self._config.log.every == 0 or last or not result.applied:
            self._progress.report(step, metrics)
            self.write(state, {**metrics, **of_saves})
        else:
            self.write(state, of_saves)
        if not result.applied or train.spike_sigma is None:
            return False
        return _is_spike(state, votes.loss, train.spike_sigma)

    def write(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """Metrics that are not those of a step."""
        if self._writer and metrics:
            self._writer.write(state.curve_position, metrics)

    def validation(self, state: RunState, found: Validation) -> None:
        """The losses of a validation; in TensorBoard also pictures, and the plan beside what is measured."""
        metrics = dict(found.losses)
        if len(state.decays) > 1 and state.position.is_decayed:
            metrics["train/budget"] = float(state.updates)
        self.write(state, metrics)
        if self._writer:
            for name, figure in validation_pictures(self._config, found):
                self._writer.write_picture(name, state.step, pixels(figure))
            with suppress(UserError):  # a damaged plan.json is reported by `mythos status`
                if planned := read_planned(Path(self._config.run.directory)):
                    shown = {f"plan/{name}": value for name, value in asdict(planned).items() if value is not None}
                    self._writer.write_points(state.curve_position, shown)

    def rewind(self, state: RunState) -> None:
        """Drop the metrics of later steps: the run has gone back to this state."""
        if self._writer:
            self._writer.rewind(state.curve_position)

    def close(self) -> None:
        """Flush and close the files, so that the last points before a failure are not lost."""
        self._progress.close()
        if self._writer:
            self._writer.close()


def _is_spike(state: RunState, loss: float, sigma: float) -> bool:
    deviations = state.loss.deviations(loss)
    state.loss.update(loss, sigma)
    if deviations > sigma:
        log.warning(
            f"step {state.step}: loss {loss:.4f} is a spike, {deviations:.1f} standard deviations above its mean"
        )
    return deviations > sigma


def depth_metrics(depths: np.ndarray, backprop_depth: int) -> dict[str, float]:
    """Mean loop steps of the global batch, and how many of them carried gradient."""
    return {"depth/mean": float(depths.mean()), "depth/with_grad": float(np.minimum(depths, backprop_depth).mean())}


def flops_metrics(config: Config, depths: np.ndarray, seconds: float, peak: float) -> dict[str, float]:
    """Model FLOP/s of a step whose sequences ran the loop to these depths, and their share of the ranks' peak."""
    flops_per_second = model_flops(config, depths) / seconds
    return {"perf/model_flops_per_second": flops_per_second, "perf/mfu": flops_per_second / peak}


def expert_metrics(load_LE: Tensor) -> dict[str, float]:
    """From the tokens that each expert of each layer got in one step, summed over ranks.

    ``moe/load_max_over_mean`` is 1 when balanced and E when one expert gets everything (of the worst layer);
    ``moe/experts_unused`` counts experts without a single token, over all layers.
    """
    worst = (load_LE.amax(dim=1) / load_LE.mean(dim=1).clamp(min=1e-9)).max()
    return {"moe/load_max_over_mean": worst.item(), "moe/experts_unused": float((load_LE == 0).sum())}
