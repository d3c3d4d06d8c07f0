"""`mythos` with a fault in it: ``python -m tests.faults.victim FAULT.json train CONFIG.yaml ...``

With ``{"where": "backward", "rank": 1, "call": 7}`` in FAULT.json, rank 1 kills itself in its seventh backward pass,
once in all attempts of the run. The ranks also record which sequences each step consumed, so that a test can check
that none was lost or used twice.
"""

import json
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from launch.cli import main


class Fault:
    """Sends the signal once, at the place and call that the file names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = json.loads(path.read_text(encoding="utf-8"))
        self.calls = 0

    def reached(self, where: str) -> bool:
        """Count a call of a place; True if the fault is due at this call."""
        if where != self.plan["where"] or int(os.environ.get("RANK", "0")) != self.plan["rank"]:
            return False
        self.calls += 1
        fired = self.path.with_suffix(".fired")
        if self.calls != self.plan["call"] or fired.exists():
            return False
        fired.write_text(repr(time.time()), encoding="utf-8")
        return True

    def strike(self) -> None:
        """Send the signal to this process."""
        os.kill(os.getpid(), getattr(signal, self.plan.get("signal", "SIGKILL")))


def before(function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """The function, with an action before each call."""

    def changed(*arguments: Any, **options: Any) -> Any:
        action()
        return function(*arguments, **options)

    return changed


def arm(fault: Fault) -> None:
    """Patch the place where the fault occurs."""
    import safetensors.torch
    import torch

    from mythos.checkpoint import layout, reader, saver, tensors
    from mythos.engine.engine import TrainingEngine
    from mythos.model.loop import Loop

    def strike_at(where: str) -> Callable[[], None]:
        return lambda: fault.strike() if fault.reached(where) else None

    Loop.forward = before(Loop.forward, strike_at("forward"))  # type: ignore[method-assign]
    torch.optim.AdamW.step = before(torch.optim.AdamW.step, strike_at("optimizer"))  # type: ignore[method-assign]
    weights = reader.CheckpointReader.weights
    reader.CheckpointReader.weights = before(weights, strike_at("load"))  # type: ignore[method-assign]
    layout.flush_directory = before(layout.flush_directory, strike_at("commit"))
    saver.snapshot = before(saver.snapshot, strike_at("snapshot"))

    backward = TrainingEngine.backward

    def backward_with_hook(engine: TrainingEngine, loss: torch.Tensor) -> None:
        if fault.reached("backward"):
            loss.register_hook(lambda gradient: fault.strike())
        if fault.reached("nan gradient"):
            loss.register_hook(lambda gradient: gradient * math.nan)
        backward(engine, loss)

    TrainingEngine.backward = backward_with_hook  # type: ignore[method-assign]
    save_file = tensors.save_file

    def write_half(content: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if fault.reached("write"):
            data = safetensors.torch.save(content)
            path.write_bytes(data[: len(data) // 2])
            fault.strike()
        if fault.plan["where"] == "stuck write" and fault.reached("stuck write"):
            time.sleep(3600)
        save_file(content, path, metadata)

    tensors.save_file = write_half


@contextmanager
def recording(directory: Path) -> Iterator[None]:
    """At each step append a hash of each sequence that this rank trains on to sequences_RANK.jsonl."""
    from mythos.engine.engine import TrainingEngine
    from mythos.train import loop

    train_step, call = loop.train_step, TrainingEngine.__call__
    attempt, step = uuid.uuid4().hex, 0

    def note_step(engine: TrainingEngine, batch: Any, *rest: Any) -> Any:
        nonlocal step
        step = batch.step
        return train_step(engine, batch, *rest)

    def train_on(engine: TrainingEngine, tokens: Any, targets: Any, plan: Any, *rest: Any) -> Any:
        if engine.module.training:
            hashes = [xxhash.xxh3_64_hexdigest(row.numpy().tobytes()) for row in tokens]
            with (directory / f"sequences_{os.environ['RANK']}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "attempt": attempt, "sequences": hashes}) + "\n")
        return call(engine, tokens, targets, plan, *rest)

    loop.train_step, TrainingEngine.__call__ = note_step, train_on  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.train_step, TrainingEngine.__call__ = train_step, call  # type: ignore[method-assign]


def sequences(directory: Path) -> dict[int, list[str]]:
    """Step -> the sequences that the last attempt at this step consumed, sorted, because any rank may have had them."""
    found: dict[int, dict[str, tuple[str, list[str]]]] = {}
    for path in sorted(directory.glob("sequences_*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            of_rank = found.setdefault(line["step"], {})
            attempt, known = of_rank.get(path.name, (line["attempt"], []))
            of_rank[path.name] = (line["attempt"], (known if attempt == line["attempt"] else []) + line["sequences"])
    return {step: sorted(s for _, each in ranks.values() for s in each) for step, ranks in found.items()}


def run(arguments: list[str]) -> int:
    """As `mythos`, with the fault armed; the first argument is FAULT.json."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    fault = Fault(Path(arguments[0]))
    arm(fault)
    with recording(fault.path.parent):
        return main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
