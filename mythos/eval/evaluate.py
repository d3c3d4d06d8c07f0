"""`mythos eval`: the validation losses of a saved checkpoint, written beside the run as JSON."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

import mythos
from mythos.checkpoint import restore
from mythos.config.derive import eval_depths, whole_mean_depth
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.data.open import RunData
from mythos.engine.engine import TrainingEngine
from mythos.engine.sections import precision
from mythos.eval.validation import validate
from mythos.files import hash_file, write_atomically
from mythos.ranks import group, preflight
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.run.directory import MANIFEST_FILE, RunDirectory
from mythos.run.metrics import json_values


def evaluate_checkpoint(config: Config, device: torch.device, found: Path) -> dict[str, float]:
    """Load the checkpoint ``found`` and measure the loss at each of ``eval.depths``. Collective.

    Rank 0 writes the losses and all that determines them to RUN/evaluations/step_XXXXXXXX_HASH.json. HASH is that of
    what determines them, so only the same evaluation replaces its file.

    Raises:
        UserError: the checkpoint or the data do not fit the configuration, or cannot be read.
    """
    preflight.check_ranks(config, device)
    with Watchdog(config.train.watchdog_s) as watchdog:
        data = preflight.open_data_everywhere(config)
        restore.check(found, watchdog.progress)
        watchdog.progress("building the model")
        engine = TrainingEngine(config, device)
        step = restore.load(engine, found, watchdog.progress)["step"]
        losses = validate(
            engine,
            data.validation,
            config.eval,
            eval_depths(config),
            whole_mean_depth(config),
            config.train.micro_batch_sequences,
            step,
            watchdog,
        )
        assert losses is not None, "no stop can be requested"
        path = group.from_rank_0(lambda: _write(found, step, losses, _settings(config, data, device, found)))
    log.info(f"written to {path}")
    return losses


def _settings(config: Config, data: RunData, device: torch.device, found: Path) -> dict[str, Any]:
    """What determines the losses."""
    tree = to_dict(config)
    del tree["eval"]["every"]
    return {
        "checkpoint_hash": hash_file(found / MANIFEST_FILE),  # its step may have been repeated with other data
        "data": data.identity["sources"],
        "eval": tree["eval"],
        "loop": tree.get("loop"),
        "model": tree["model"],
        "precision": precision(config, device),
        "micro_batch_sequences": config.train.micro_batch_sequences,
        "ranks": dist.get_world_size(),
        "version": mythos.__version__,
    }


def _write(found: Path, step: int, losses: dict[str, float], settings: dict[str, Any]) -> Path:
    directory = RunDirectory(found.parent.parent).evaluations
    digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True))
    path = directory / f"{found.name}_{digest}.json"
    result = {"checkpoint": found.name, "step": step, **json_values(losses), **settings}
    result["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    directory.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2))
    return path
