"""`mythos eval`: what a saved checkpoint is worth, written beside the run as JSON and to TensorBoard."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

import mythos
from mythos.checkpoint import layout, restore
from mythos.config.derive import eval_depths, whole_mean_depth
from mythos.config.layers import read_saved
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.data.open import RunData
from mythos.engine.engine import TrainingEngine
from mythos.engine.sections import precision
from mythos.errors import UserError
from mythos.eval.forward import evaluation_forward
from mythos.eval.generate import Sampling, continuation
from mythos.eval.lead import lead
from mythos.eval.measure import Ask, Items, Metrics, Question, Wanted, hash_tasks, task_metrics, text_metrics
from mythos.eval.requests import Prompt, score
from mythos.eval.validation import validate
from mythos.files import hash_file, write_atomically
from mythos.ranks import group, preflight
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.run.directory import MANIFEST_FILE, RunDirectory, newest_checkpoint, saved_course
from mythos.run.metrics import json_values
from mythos.run.tensorboard import write_evaluation

POLL_S = 10.0
ACCURACIES = ("acc", "exact_match")
"""How the names of accuracies in lm-evaluation-harness begin."""


@dataclass(frozen=True)
class Evaluator:
    """An engine on all ranks, and what to measure of the checkpoints that are loaded into it."""

    config: Config
    wanted: Wanted
    engine: TrainingEngine
    data: RunData
    watchdog: Watchdog

    def measure(self, found: Path) -> Metrics:
        """Load the checkpoint ``found`` and measure it at each of ``eval.depths``. Collective.

        Rank 0 writes the metrics and all that determines them to RUN/evaluations/step_XXXXXXXX_HASH.json, and what was
        measured of each document, and of the experts, to a file .npz beside it. HASH is that of what determines them,
        so only the same evaluation replaces its files.

        Raises:
            UserError: the checkpoint does not fit the configuration, or a file cannot be read.
        """
        restore.check(found, self.watchdog.progress)
        path, settings = group.from_rank_0(lambda: self._result_of(found))
        step = restore.load(self.engine, found, self.watchdog.progress)["step"]
        depths: tuple[int | None, ...] = eval_depths(self.config) or (None,)
        validation = validate(self.engine, self.data.validation, self.config, step, self.watchdog)
        assert validation is not None, "no stop can be requested"
        losses = validation.losses

        def measure(ask: Ask) -> tuple[Metrics, Items, dict[str, Any]]:
            metrics, items = text_metrics(ask, self.data, losses, depths, self.config.eval.sequences, self.wanted)
            if not self.wanted.tasks:
                return metrics, items, {}
            of_tasks, details = task_metrics(ask, self.data, self.config.data.sequence_length, depths, self.wanted)
            return metrics | of_tasks, items, details

        with self.engine.evaluation():
            metrics, items, details = lead(measure, self._answer)
        if validation.load_LTE is not None:
            items["expert_load"] = validation.load_LTE
        metrics = losses | metrics
        result = {"checkpoint": found.name, "step": step, **json_values(metrics), "tasks": details, **settings}
        points = tensorboard_points(metrics, details, whole_mean_depth(self.config))
        group.from_rank_0(lambda: _write(path, step, points, items, result))
        log.info(f"written to {path}")
        return metrics

    def watch(self, run: Path) -> None:
        """Measure every checkpoint of a run once, those to come too, until it has reached its budgets. Collective.

        A checkpoint that the run removes before it is measured is left out.

        Raises:
            UserError: as ``measure``.
        """
        while (found := group.from_rank_0(lambda: self._wait_for_checkpoint(run))) is not None:
            try:
                self.measure(found)
            except UserError:
                if group.from_rank_0(found.exists):
                    raise
                log.warning(f"{found}: removed by the run before it was measured")

    def _wait_for_checkpoint(self, run: Path) -> Path | None:
        """The oldest checkpoint without a result; None when the run has reached its budgets and each has one."""
        directory = RunDirectory(run)
        while True:
            self.watchdog.progress("waiting for a checkpoint")
            position = None
            with suppress(UserError):  # just removed by the run; a damaged one is reported where it is measured
                _, position = newest_checkpoint(run)
            for found in reversed(layout.resumable_checkpoints(directory.checkpoints)):
                with suppress(FileNotFoundError):  # just removed by the run
                    if not self._result_of(found)[0].exists():
                        return found
            course = saved_course(read_saved(directory.config))
            if position is not None and (course is None or course.target(position) is None):
                return None
            time.sleep(POLL_S)

    def _answer(self, question: Question) -> Any:
        """The scores of requests, or a prompt with its continuation. Collective."""
        forward = evaluation_forward(self.engine, self.config.eval, self.watchdog, "scoring text", None)
        longest, device = self.config.data.sequence_length, self.engine.device
        match question.asked:
            case Prompt(ids, tokens, temperature):
                seed = self.config.seed + len(ids)  # the parts of a text are drawn one after the other
                return continuation(
                    lambda new, cache: forward(new, None, None, cache),
                    self.engine.module,
                    ids,
                    tokens,
                    Sampling(temperature),
                    question.steps,
                    seed,
                    device,
                )
            case requests:
                micro_batch_tokens = self.config.train.micro_batch_sequences * longest
                return score(forward, requests, question.steps, micro_batch_tokens, longest, device)

    def _result_of(self, found: Path) -> tuple[Path, dict[str, Any]]:
        """The file of a checkpoint's metrics, and what determines them."""
        # The step may have been repeated with other data.
        settings = {"checkpoint_hash": hash_file(found / MANIFEST_FILE)} | self._settings
        digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True))
        return RunDirectory(found.parent.parent).evaluations / f"{found.name}_{digest}.json", settings

    @cached_property
    def _settings(self) -> dict[str, Any]:
        tree = to_dict(self.config)
        del tree["eval"]["every"]
        return {
            "data": self.data.identity["sources"],
            "eval": tree["eval"],
            "wanted": asdict(self.wanted),
            "task_files": hash_tasks(self.wanted),
            "loop": tree.get("loop"),
            "model": tree["model"],
            "precision": precision(self.config, self.engine.device),
            "micro_batch_sequences": self.config.train.micro_batch_sequences,
            "ranks": dist.get_world_size(),
            "version": mythos.__version__,
        }


@contextmanager
def open_evaluator(config: Config, device: torch.device, wanted: Wanted) -> Iterator[Evaluator]:
    """Check that all ranks match, open the data and build the engine, watched until the block ends. Collective.

    Raises:
        UserError: the ranks or the data do not fit the configuration.
    """
    with Watchdog(config.train.watchdog_s) as watchdog:
        data = preflight.open_data_everywhere(config)
        watchdog.progress("building the model")
        yield Evaluator(config, wanted, TrainingEngine(config, device), data, watchdog)


def tensorboard_points(metrics: Metrics, tasks: Mapping[str, Any], mean_depth: int | None) -> Metrics:
    """What TensorBoard shows: the metrics, and two by which looped and dense models share a chart.

    ``eval/rows_bits_per_byte`` of a looped model is at its mean depth; ``eval/best_task`` is the largest accuracy of a
    task there. ``tasks`` are the results of each by its name and depth.
    """
    points = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    at_mean_depth = f"_depth_{mean_depth}" if mean_depth is not None else ""
    if (bits := points.get(f"eval/rows_bits_per_byte{at_mean_depth}")) is not None:
        points["eval/rows_bits_per_byte"] = bits
    accuracies = [
        points[f"eval/{name}"]
        for name, results in tasks.items()
        if name.endswith(at_mean_depth) and ("accuracy" in results or next(iter(results), "").startswith(ACCURACIES))
    ]
    return points | ({"eval/best_task": max(accuracies)} if accuracies else {})


def _write(path: Path, step: int, points: Metrics, items: Items, result: dict[str, Any]) -> None:
    """The result comes last: where it is, everything is."""
    result["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    content = BytesIO()
    np.savez_compressed(content, **items)
    write_atomically(path.with_suffix(".npz"), content.getvalue())
    write_atomically(path, json.dumps(result, indent=2))
    if is_new:
        write_evaluation(path.parent.parent, step, points)
