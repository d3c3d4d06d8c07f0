"""What of a training engine goes into a checkpoint, and how it comes back on any number of ranks.

Every rank writes the fp32 weights and the optimizer state of the elements that it updates, each element once over all
ranks. A rank that loads asks for the elements that it updates now (see ``mythos.checkpoint.pieces``). Nothing else has
to be kept: learning rates and other hyperparameters follow from the configuration and the step, and training draws no
number from a global random generator.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.checkpoint import layout
from mythos.checkpoint.pieces import BUFFER, PieceReader
from mythos.errors import UserError
from mythos.metrics.console import log
from mythos.train.distributed import agree
from mythos.train.engine import TrainingEngine


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, on the CPU."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    pieces: dict[str, tuple[int, int, float]]
    """Start, stop and optimizer steps of each parameter that has elements here."""


class HostBuffer:
    """Memory on the CPU that is filled anew by each snapshot: pinned where a GPU copies into it, and never freed.

    Without ``keep`` tensors that lie on the CPU already are passed on as they are: enough while training waits.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor's content now; complete once ``finish`` was called."""
        if not self._keep and tensor.device.type == "cpu":
            return tensor
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[name] = kept
        return kept.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Wait for copies from the GPU."""
        if any(tensor.is_pinned() for tensor in self._kept.values()):
            torch.cuda.current_stream().synchronize()


def snapshot(engine: TrainingEngine, buffer: HostBuffer) -> Snapshot:
    """Copy this rank's part: no collective, and the time that a save keeps training waiting."""
    weights, optimizer, pieces = {}, {}, {}
    for piece in engine.pieces():
        start, stop = piece.share
        if start == stop:
            continue
        weights[piece.name] = buffer.copy(piece.name, piece.weights(start, stop))
        for state, values in piece.optimizer_state(start, stop).items():
            name = f"{piece.name}.{state}"
            optimizer[name] = buffer.copy(name, values)
        pieces[piece.name] = (start, stop, piece.steps)
    if dist.get_rank() == 0:
        for name, tensor in engine.buffers().items():
            weights[BUFFER + name] = buffer.copy(BUFFER + name, tensor)
    buffer.finish()
    return Snapshot(weights, optimizer, pieces)


def world_shape(engine: TrainingEngine) -> dict[str, int | str]:
    """How the state is spread, for those who read state.json."""
    return {
        "ranks": dist.get_world_size(),
        "zero_stage": engine.stage,
        "expert_parallel_size": engine.expert_parallel_size,
        "precision": engine.precision,
    }


def newest_valid(directory: Path) -> Path | None:
    """The checkpoint to resume from, all of whose files were found whole; None for a run without one. Collective.

    Half-written and damaged ones are named in the log and set aside, unless no other is left.

    Raises:
        UserError: checkpoints are there, and every one is damaged.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    candidates: list[Path] = _from_rank_0(lambda: _tidy(directory))
    damaged: list[tuple[Path, str]] = []
    for candidate in candidates:
        wrong = _problems(candidate, rank, ranks)
        everyones: list[Any] = [None] * ranks
        dist.all_gather_object(everyones, wrong)
        found = [problem for each in everyones for problem in each]
        if not found:
            _from_rank_0(lambda: _set_aside(damaged))
            return candidate
        log.error(f"{candidate.name} is damaged: {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else ""))
        damaged.append((candidate, found[0]))
    if damaged:
        error = UserError(
            f"{directory}: every checkpoint is damaged ({'; '.join(problem for _, problem in damaged)}): restore one, "
            "or move them away to start over"
        )
        error.agreed = True
        raise error
    return None


def load(engine: TrainingEngine, found: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint that any number of ranks has written; returns the saved state. Collective.

    Raises:
        UserError: it belongs to another model, or cannot be read.
    """
    reader, state = agree(lambda: (PieceReader(found), layout.read_state(found)))
    now, then = world_shape(engine), state["world"]
    if now != then:
        changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key) != now[key])
        log.info(f"{found.name} was written with another layout ({changes}): every rank reads the parts it needs")
    agree(lambda: _check_same_model(engine, reader))
    agree(lambda: _read_pieces(engine, reader))
    engine.refresh_weights()
    return state


def _read_pieces(engine: TrainingEngine, reader: PieceReader) -> None:
    try:
        for piece in engine.pieces():
            reader.weights(piece.name, piece.start, piece.stop, piece.weights(piece.start, piece.stop))
            saved = reader.optimizer_state(piece.name, piece.start, piece.stop)
            piece.set_optimizer_state(saved, reader.optimizer_steps(piece.name))
        engine.set_buffers(reader.buffers())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{reader.checkpoint}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _check_same_model(engine: TrainingEngine, reader: PieceReader) -> None:
    saved = {name: parameter.shape for name, parameter in reader.manifest.parameters.items()}
    for piece in engine.pieces():
        if saved.get(piece.name) != piece.shape:
            raise UserError(
                f"{reader.checkpoint}: {piece.name} is {saved.get(piece.name, 'missing')}, this model's is "
                f"{piece.shape}: give the run's own configuration"
            )


def _problems(checkpoint: Path, rank: int, ranks: int) -> list[str]:
    """What this rank finds wrong with its share of the files."""
    try:
        manifest = layout.Manifest.load(checkpoint)
    except UserError as error:
        return [str(error)]
    return layout.problems(checkpoint, manifest, sorted(manifest.files)[rank::ranks])


def _tidy(directory: Path) -> list[Path]:
    for path in layout.half_written(directory):
        log.warning(f"{path.name} was not finished: set aside as {layout.set_aside(path)}")
    named, found = layout.latest(directory), layout.candidates(directory)
    if named is not None and named not in found:
        log.error(f"{directory / layout.POINTER} names {named.name}, which is missing")
    return found


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    for path, problem in damaged:
        log.error(f"set aside as {layout.set_aside(path)}: {problem}")


def _from_rank_0(function: Callable[[], Any]) -> Any:
    """What the function returns on rank 0, on every rank. Collective."""

    def guarded() -> Any:
        try:
            return function() if dist.get_rank() == 0 else None
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}: the run directory must be writable") from error

    result = [agree(guarded)]
    dist.broadcast_object_list(result, src=0)
    return result[0]
