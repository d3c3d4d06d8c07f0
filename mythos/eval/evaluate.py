"""`mythos eval`: the validation losses of a saved checkpoint, written beside the run as JSON."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mythos.checkpoint import restore
from mythos.config.derive import eval_depths
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.eval.validation import validate
from mythos.files import write_atomically
from mythos.ranks import preflight
from mythos.ranks.watchdog import Watchdog
from mythos.run.directory import RunDirectory


def evaluate_checkpoint(config: Config, device: torch.device, found: Path) -> dict[str, Any]:
    """Load the checkpoint ``found`` and measure the loss at each of ``eval.depths``. Collective.

    Rank 0 writes the result to RUN/evaluations/step_XXXXXXXX.json; an existing one is replaced.

    Raises:
        UserError: the checkpoint or the data do not fit the configuration, or cannot be read.
    """
    preflight.check_ranks(config, device)
    with Watchdog(config.train.watchdog_s) as watchdog:
        data = preflight.open_data_everywhere(config)
        restore.check(found)
        engine = TrainingEngine(config, device)
        step = restore.load(engine, found)["step"]
        micro_batch = config.train.micro_batch_sequences
        losses = validate(engine, data.validation, config.eval, eval_depths(config), micro_batch, step, watchdog) or {}
    result = {
        "checkpoint": found.name,
        "step": step,
        **losses,
        "sequences": config.eval.sequences,
        "data": data.identity["sources"],
        "ranks": dist.get_world_size(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if dist.get_rank() == 0:
        directory = RunDirectory(found.parent.parent).evaluations
        directory.mkdir(exist_ok=True)
        write_atomically(directory / f"{found.name}.json", json.dumps(result, indent=2))
    return result
