"""`mythos eval`: what a saved checkpoint is worth, written beside the run as JSON and to TensorBoard."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

import mythos
from mythos.checkpoint import restore
from mythos.config.derive import eval_depths
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.data.open import RunData
from mythos.engine.engine import TrainingEngine
from mythos.engine.sections import precision
from mythos.eval.forward import evaluation_forward
from mythos.eval.lead import lead
from mythos.eval.measure import Ask, Metrics, Scoring, Wanted, text_metrics
from mythos.eval.requests import Score, score
from mythos.eval.validation import validate
from mythos.files import hash_file, write_atomically
from mythos.ranks import group, preflight
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.run.directory import MANIFEST_FILE, RunDirectory
from mythos.run.metrics import json_values, write_points


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

        Rank 0 writes the metrics and all that determines them to RUN/evaluations/step_XXXXXXXX_HASH.json. HASH is that
        of what determines them, so only the same evaluation replaces its file.

        Raises:
            UserError: the checkpoint does not fit the configuration, or a file cannot be read.
        """
        restore.check(found, self.watchdog.progress)
        settings = group.from_rank_0(lambda: self._settings(found))
        step = restore.load(self.engine, found, self.watchdog.progress)["step"]
        depths: tuple[int | None, ...] = eval_depths(self.config) or (None,)
        losses = validate(
            self.engine,
            self.data.validation,
            self.config,
            step,
            self.watchdog,
        )
        assert losses is not None, "no stop can be requested"

        def measure(ask: Ask) -> Metrics:
            return text_metrics(ask, self.data, losses, depths, self.config.eval.sequences, self.wanted)

        with self.engine.evaluation():
            metrics = losses | lead(measure, self._scores)
        path = group.from_rank_0(lambda: _write(found, step, metrics, settings))
        log.info(f"written to {path}")
        return metrics

    def _scores(self, asked: Scoring) -> list[Score]:
        options, sequence_length = self.config.eval, self.config.data.sequence_length
        return score(
            evaluation_forward(self.engine, options, self.watchdog, "scoring text", None),
            asked.requests,
            asked.steps,
            self.config.train.micro_batch_sequences * sequence_length,
            sequence_length,
            self.engine.device,
        )

    def _settings(self, found: Path) -> dict[str, Any]:
        """What determines the metrics."""
        tree = to_dict(self.config)
        del tree["eval"]["every"]
        return {
            "checkpoint_hash": hash_file(found / MANIFEST_FILE),  # its step may have been repeated with other data
            "data": self.data.identity["sources"],
            "eval": tree["eval"],
            "wanted": asdict(self.wanted),
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


def _write(found: Path, step: int, metrics: Metrics, settings: dict[str, Any]) -> Path:
    run = RunDirectory(found.parent.parent)
    digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True))
    path = run.evaluations / f"{found.name}_{digest}.json"
    result = {"checkpoint": found.name, "step": step, **json_values(metrics), **settings}
    result["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    run.evaluations.mkdir(exist_ok=True)
    is_new = not path.exists()
    write_atomically(path, json.dumps(result, indent=2))
    if is_new:
        write_points(run.evaluation_points, step, {name: value for name, value in metrics.items() if "eval/" in name})
    return path
