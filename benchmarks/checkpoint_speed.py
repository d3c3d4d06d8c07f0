"""The cost of saving and loading: `mpiexec -n 2 python -m benchmarks.checkpoint_speed`.

A looped mixture-of-experts model of about 100M parameters is trained on random tokens. Measured are steps without a
save, synchronous and asynchronous saves, and loading a checkpoint into the layout that wrote it and into another one.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mythos.checkpoint import restore as checkpoint
from mythos.checkpoint.saver import Saver
from mythos.checkpoint.snapshot import world_shape
from mythos.config.derive import global_batch_sequences
from mythos.config.load import validate
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.plan.schedule import schedule
from mythos.ranks import group
from mythos.ranks.world import read_world
from mythos.run.directory import RunDirectory
from mythos.train.batch import draw_depths, micro_batch_plan

SEQUENCE_LENGTH = 128


def configuration(ranks: int, **sections: dict[str, Any]) -> Config:
    """About 100M parameters, most of them in experts; ``sections`` override."""
    tree: dict[str, Any] = {
        "run": {"directory": "none"},
        "model": {
            "kind": "looped",
            "vocabulary_size": 32768,
            "width": 640,
            "attention": {"kind": "gqa", "heads": 10, "kv_heads": 10, "head_size": 64},
            "feed_forward": {"kind": "swiglu", "hidden_size": 1728},
            "prelude_layers": 1,
            "core_layers": 2,
            "coda_layers": 1,
            "core_experts": {
                "experts": 16,
                "experts_per_token": 2,
                "expert_hidden_size": 1024,
                "shared_hidden_size": 1024,
            },
        },
        "loop": {"mean_depth": 4, "backprop_depth": 2},
        "train": {"steps": 100, "global_batch_sequences": 2 * ranks, "micro_batch_sequences": 2},
        "optim": {"learning_rate": 1e-3},
        "parallel": {"expert_parallel_size": ranks},
        "data": {"directory": "none", "sequence_length": SEQUENCE_LENGTH},
    }
    return validate(tree | sections, ranks)


class Training:
    """An engine and the number of its steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.engine, self.step = config, TrainingEngine(config, device), 0
        self.saver: Saver | None = None

    def steps(self, count: int) -> list[float]:
        """Seconds of each of some steps, including what the training loop does for a save in progress."""
        seconds = []
        for _ in range(count):
            dist.barrier()
            begun = time.perf_counter()
            self.step += 1
            sample = (self.step - 1) * global_batch_sequences(self.config)
            depths = draw_depths(self.config, self.step, sample)
            tokens = torch.randint(32768, (2, SEQUENCE_LENGTH + 1), device=self.engine.device)
            plan = micro_batch_plan(self.config, depths, sample, 0)
            self.engine.backward(self.engine(tokens[:, :-1], tokens[:, 1:], plan).total)
            self.engine.step(schedule(self.config.optim, 0, self.config.train.steps))
            pending = bool(self.saver and self.saver.pending)
            rows = group.gather(torch.tensor([float(pending)], device=self.engine.device))
            if self.saver:
                self.saver.advance(bool(rows.max()))
            seconds.append(time.perf_counter() - begun)
        return seconds


def measure_saves(training: Training, directory: Path, mode: str, saves: int, between: int) -> None:
    """Print the cost of saves in a mode, and the time of the steps during a save."""
    options = configuration(dist.get_world_size(), checkpoint={"mode": mode, "keep_last": 1}).checkpoint
    training.saver = Saver(directory, options, training.engine)
    stalls, totals, beside = [], [], []
    for number in range(saves + 1):
        begun = time.perf_counter()
        training.saver.start(training.step, {"step": training.step, "world": world_shape(training.engine)})
        stall = time.perf_counter() - begun
        seconds = training.steps(between)
        training.saver.finish()
        metrics = training.saver.metrics()
        if number:  # the first save allocates the memory that the others reuse
            stalls.append(stall)
            totals.append(metrics["checkpoint/save_seconds"])
            beside += seconds
    tell(
        f"{mode:<6} training waits {statistics.median(stalls):6.2f} s ({max(stalls):.2f} at most), "
        f"save {statistics.median(totals):6.2f} s, {metrics['checkpoint/gigabytes']:.2f} GB; "
        f"steps during it {statistics.median(beside):.2f} s"
    )
    training.saver = None


def measure_load(config: Config, device: torch.device, directory: Path) -> None:
    """Print the time to verify and to read the newest checkpoint."""
    engine = TrainingEngine(config, device)
    dist.barrier()
    begun = time.perf_counter()
    found = checkpoint.newest_valid(directory)
    assert found is not None
    checked = time.perf_counter()
    checkpoint.load(engine, found)
    tell(
        f"load   {found.name} at {world_shape(engine)}: hashes checked in {checked - begun:.2f} s, read in "
        f"{time.perf_counter() - checked:.2f} s"
    )


def tell(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--between", type=int, default=4, help="steps after each save")
    arguments = parser.parse_args()
    with read_world() as world:
        world.export()
        device = group.start("auto")
        place: list[Any] = [arguments.directory or Path(tempfile.mkdtemp(prefix="mythos-checkpoint-"))]
        dist.broadcast_object_list(place, src=0)
        directory = RunDirectory(place[0]).checkpoints
        directory.mkdir(parents=True, exist_ok=True)
        config = configuration(world.world_size)
        training = Training(config, device)
        parameters = sum(torch.Size(shape).numel() for shape in training.engine.shapes().values())
        training.steps(2)
        plain = statistics.median(training.steps(6))
        tell(f"{parameters / 1e6:.0f}M parameters, {world.world_size} ranks on {device.type}; {plain:.2f} s per step")
        for mode in ("sync", "async"):
            measure_saves(training, directory, mode, arguments.saves, arguments.between)
        del training
        measure_load(config, device, directory)
        other_layout = {"expert_parallel_size": 1, "zero_stage": 2}
        measure_load(configuration(world.world_size, parallel=other_layout), device, directory)
        dist.barrier()
        if arguments.directory is None and dist.get_rank() == 0:
            shutil.rmtree(place[0])
        group.finish()


if __name__ == "__main__":
    main()
