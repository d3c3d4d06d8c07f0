"""`mythos train` without its command line, which needs packages that a machine with a GPU may lack:

    python -m tests.gpu.program CONFIG.json [SIGNAL N]

In its Nth backward pass the process sends itself the signal.
"""

import json
import os
import signal
import sys
from pathlib import Path

from mythos.config.load import validate
from mythos.engine.engine import TrainingEngine
from mythos.ranks import group
from mythos.ranks.determinism import compute_deterministically
from mythos.ranks.preemption import StopRequest
from mythos.train.loop import train


def main(config_file: str, signal_name: str = "", at: str = "0") -> int:
    """Train in this process, which is rank 0 of 1; returns the exit code."""
    stop = StopRequest()
    config = validate(json.loads(Path(config_file).read_text(encoding="utf-8")), 1)
    stop.exit_after(config.preemption.grace_s)
    device = group.start(config.device)
    if config.deterministic and device.type == "cuda":
        compute_deterministically(os.environ)
    if signal_name:
        backward, passes = TrainingEngine.backward, iter(range(1, config.train.steps + 1))

        def with_signal(engine: TrainingEngine, loss: object) -> None:
            if next(passes) == int(at):
                os.kill(os.getpid(), signal.Signals[signal_name])
            backward(engine, loss)  # type: ignore[arg-type]

        TrainingEngine.backward = with_signal  # type: ignore[method-assign,assignment]
    return train(config, device, stop)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
