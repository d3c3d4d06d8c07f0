"""What a rank costs beside the model's arithmetic: the exchange of a step, ZeRO's collectives, the watchdog, metrics.

python -m benchmarks.rank_cost [RANKS ...]

Every rank trains a tiny model on the same number of sequences, so that its arithmetic does not depend on the number of
ranks. Two runs that differ by STEPS steps give the time of a step without the start and the end of a run. Many ranks
share the cores of a machine; the processor time of a rank does not depend on that, the wall time does.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from mythos.config.schema import Config
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import run_training

FIRST_STEPS, STEPS = 5, 20


def seconds_of_a_run(config: Config) -> tuple[float, float]:
    """Wall time and processor time of this rank, all of its threads included."""
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    run_training(config)
    return time.perf_counter() - wall, time.process_time() - processor


def seconds_of_a_step(ranks: int, data: Path, directory: Path) -> tuple[float, float]:
    """Wall time of a step, and the mean over ranks of its processor time."""
    pool = RankPool(ranks)
    totals = []
    for steps in (FIRST_STEPS, FIRST_STEPS + STEPS):
        options = {"train__steps": steps, "train__global_batch_sequences": 2 * ranks, "eval__sequences": 1}
        run = directory / f"{ranks} ranks, {steps} steps"
        config = tiny_config("looped", data, run, ranks, train__micro_batch_sequences=2, **options)
        rows = pool.run(seconds_of_a_run, config)
        totals.append([sum(column) / ranks for column in zip(*rows, strict=True)])
    pool.close()
    wall, processor = ((after - before) / STEPS for before, after in zip(*totals, strict=True))
    return wall, processor


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:]] or [1, 2, 4, 8, 16]
    with tempfile.TemporaryDirectory() as temporary:
        data = write_data_set(Path(temporary) / "data", VOCABULARY)
        print("ranks  processor time of a rank and step  wall time of a step")
        for ranks in numbers:
            wall, processor = seconds_of_a_step(ranks, data, Path(temporary))
            print(f"{ranks:5}  {1000 * processor:33.1f} ms  {1000 * wall:16.1f} ms", flush=True)


if __name__ == "__main__":
    main()
