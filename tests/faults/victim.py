"""`mythos` with faults in it: ``python -m tests.faults.victim FAULT.json train CONFIG.yaml ...``

With ``{"where": "backward", "rank": 1, "call": 7}`` in FAULT.json, rank 1 kills itself in its seventh backward pass,
once in all attempts of the run; FAULT.json may also be a directory of such files. Further keys:

    "signal": "SIGTERM"     sends this signal instead of SIGKILL; "HANG" blocks the thread for ever
    "from_step": 30         counts the calls from this step on
    "after": "04"           counts them only when the file 04.fired exists, which 04.json leaves when it has occurred
    "step": 30              instead of "call": at every call in this step, in every attempt that comes to it

The ranks also record which sequences each step consumed, so that a test can check that none was lost or used twice,
and rank 0 records when each step began and ended.
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

FIRED = ".fired"
"""The end of the name of the file beside FAULT.json that holds the time at which the fault occurred."""
STEPS_FILE = "steps.jsonl"
HANG_S = 3600.0

CALLS_A_STEP = {"forward": 1, "backward": 1, "optimizer": 3}
CALLS_A_SAVE = {"write": 2, "commit": 3, "snapshot": 1}
"""How often each place is passed, on each rank that passes it: only rank 0 commits."""


class Fault:
    """Sends the signal at the place and call that the file names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = json.loads(path.read_text(encoding="utf-8"))
        self.calls = 0

    def reached(self, where: str, step: int) -> bool:
        """Count a call of a place; True if the fault is due at this call."""
        if where != self.plan["where"] or int(os.environ.get("RANK", "0")) != self.plan["rank"]:
            return False
        fired = self.path.with_suffix(FIRED)
        if "step" in self.plan:
            due = step == self.plan["step"]
        else:
            self.calls += self._armed(step)
            due = self.calls == self.plan["call"] and not fired.exists()
        if not due:
            return False
        if not fired.exists():
            fired.write_text(repr(time.time()), encoding="utf-8")
        return True

    def _armed(self, step: int) -> bool:
        """Whether calls count already."""
        earlier = self.plan.get("after")
        return step >= self.plan.get("from_step", 0) and (
            earlier is None or self.path.with_name(earlier + FIRED).exists()
        )

    def strike(self) -> None:
        """Send the signal to this process."""
        name = self.plan.get("signal", "SIGKILL")
        if name == "HANG":
            time.sleep(HANG_S)
        else:
            os.kill(os.getpid(), getattr(signal, name))


class Faults:
    """All faults of a run, and the step that this rank is at (0 before the first)."""

    def __init__(self, path: Path) -> None:
        self._faults = [Fault(file) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
        self.step = 0

    def due(self, where: str) -> Fault | None:
        """Count a call of a place in all faults; returns one that is due at this call."""
        due = [fault for fault in self._faults if fault.reached(where, self.step)]
        return due[0] if due else None

    def strike_at(self, where: str) -> Callable[[], None]:
        """What to call at a place."""

        def strike() -> None:
            if fault := self.due(where):
                fault.strike()

        return strike


def before(function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """The function, with an action before each call."""

    def changed(*arguments: Any, **options: Any) -> Any:
        action()
        return function(*arguments, **options)

    return changed


def arm(faults: Faults) -> None:
    """Patch the places where faults occur."""
    import safetensors.torch
    import torch

    from mythos.checkpoint import layout, reader, saver, tensors
    from mythos.engine.engine import TrainingEngine
    from mythos.model.loop import Loop
    from mythos.train import loop

    Loop.forward = before(Loop.forward, faults.strike_at("forward"))  # type: ignore[method-assign]
    torch.optim.AdamW.step = before(torch.optim.AdamW.step, faults.strike_at("optimizer"))  # type: ignore[method-assign]
    weights = reader.CheckpointReader.weights
    reader.CheckpointReader.weights = before(weights, faults.strike_at("load"))  # type: ignore[method-assign]
    layout.flush_directory = before(layout.flush_directory, faults.strike_at("commit"))
    saver.snapshot = before(saver.snapshot, faults.strike_at("snapshot"))

    train_step = loop.train_step

    def note_step(engine: TrainingEngine, batch: Any, *rest: Any) -> Any:
        faults.step = batch.step
        return train_step(engine, batch, *rest)

    loop.train_step = note_step
    backward = TrainingEngine.backward

    def backward_with_hook(engine: TrainingEngine, loss: torch.Tensor) -> None:
        if fault := faults.due("backward"):
            loss.register_hook(lambda gradient: fault.strike())
        if faults.due("nan gradient"):
            loss.register_hook(lambda gradient: gradient * math.nan)
        backward(engine, loss)

    TrainingEngine.backward = backward_with_hook  # type: ignore[method-assign]
    save_file = tensors.save_file

    def write_half(content: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if fault := faults.due("write"):
            data = safetensors.torch.save(content)
            path.write_bytes(data[: len(data) // 2])
            fault.strike()
        save_file(content, path, metadata)

    tensors.save_file = write_half


@contextmanager
def recording(directory: Path) -> Iterator[None]:
    """At each step append a hash of each sequence that this rank trains on to sequences_RANK.jsonl.

    Rank 0 appends to STEPS_FILE when each step began and ended, in seconds since the epoch.
    """
    from mythos.engine.engine import TrainingEngine
    from mythos.train import loop

    train_step, call = loop.train_step, TrainingEngine.__call__
    attempt, step = uuid.uuid4().hex, 0

    def note_step(engine: TrainingEngine, batch: Any, *rest: Any) -> Any:
        nonlocal step
        step, began = batch.step, time.time()
        result = train_step(engine, batch, *rest)
        if os.environ["RANK"] == "0":
            append(STEPS_FILE, {"step": step, "attempt": attempt, "began": began, "ended": time.time()})
        return result

    def append(name: str, line: dict[str, Any]) -> None:
        with (directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def train_on(engine: TrainingEngine, tokens: Any, targets: Any, plan: Any, *rest: Any, **options: Any) -> Any:
        if engine.module.training:
            hashes = [xxhash.xxh3_64_hexdigest(row.numpy().tobytes()) for row in tokens]
            line = {"step": step, "attempt": attempt, "sequences": hashes}
            append(f"sequences_{os.environ['RANK']}.jsonl", line)
        return call(engine, tokens, targets, plan, *rest, **options)

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
    """As `mythos`, with the faults armed; the first argument is FAULT.json or a directory of such files."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    path = Path(arguments[0])
    arm(Faults(path))
    with recording(path.parent):
        return main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
