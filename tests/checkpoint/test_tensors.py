"""Tensors are written as safetensors files, and parameters are read back from any division into shards."""

import os
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mythos.checkpoint import manifest, tensors
from mythos.checkpoint.layout import damaged_files
from mythos.checkpoint.reader import BUFFER, CheckpointReader
from mythos.checkpoint.tensors import write_tensors
from mythos.files import hash_file
from mythos.run.directory import STATE_FILE

MATRICES = {"a": (3, 7), "b": (10, 5)}
"""Two matrices with a second moment for each column, and one with one for each row."""
FIRST_ELEMENTS = {"a": [*range(7), *range(21, 28)], "b": list(range(0, 50, 5))}
"""Of these columns and rows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_a_file_is_read_back_with_its_hash_and_size(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    content = {
        "matrix": (100 * torch.randn(7, 5, generator=generator)).to(dtype),
        "part": (100 * torch.randn(30, generator=generator)).to(dtype)[3:20],
        "empty": torch.zeros(0, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    written = write_tensors(tmp_path / "x.safetensors", content)
    assert written == (tmp_path.joinpath("x.safetensors").stat().st_size, hash_file(tmp_path / "x.safetensors"))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, content[name]), name


def test_parameters_are_read_back_from_any_division(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    parameters = {"a": torch.randn(6, 7), "b": torch.randn(50), "c": torch.randn(1)}
    for ranks in (1, 2, 3, 8):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        weights: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        optimizer: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        saved = {}
        for name, tensor in parameters.items():
            values, kept_with = tensor.flatten(), FIRST_ELEMENTS.get(name)
            cuts = [0, *sorted(generator.integers(0, tensor.numel() + 1, ranks - 1)), tensor.numel()]
            shards = []
            for rank, (start, stop) in enumerate(pairwise(cuts)):
                if start < stop:
                    flat = tensor.flatten()[start:stop].contiguous()
                    weights[rank][name] = flat
                    if name != "c":  # has had no update yet
                        optimizer[rank][f"{name}.exp_avg"] = 2 * flat
                    if kept_with is not None:
                        here = [element for element in kept_with if start <= element < stop]
                        optimizer[rank][f"{name}.second_moment"] = 3 * values[here]
                    shards.append(manifest.ShardRecord(rank, int(start), int(stop), 0.0 if name == "c" else 5.0))
            saved[name] = manifest.SavedParameter(tuple(tensor.shape), tuple(shards), MATRICES.get(name))
        weights[0][f"{BUFFER}router.bias"] = torch.arange(4.0)
        (directory / STATE_FILE).write_text("{}", encoding="utf-8")
        files = {STATE_FILE: manifest.FileRecord.of(directory / STATE_FILE)}
        for rank in range(ranks):
            for name, of_rank in (
                (manifest.weights_file(rank), weights[rank]),
                (manifest.optimizer_file(rank), optimizer[rank]),
            ):
                files[name] = write_tensors(directory / name, of_rank)
        manifest.Manifest(1, files, saved).save(directory)
        assert damaged_files(directory, manifest.Manifest.load(directory)) == {}

        reader = CheckpointReader(directory)
        for name, tensor in parameters.items():
            assert torch.equal(reader.parameter(name), tensor)
            for _ in range(20):
                start, stop = sorted(generator.integers(0, tensor.numel() + 1, 2).tolist())
                out = torch.full((stop - start,), torch.nan)
                reader.weights(name, start, stop, out)
                assert torch.equal(out, tensor.flatten()[start:stop])
                state = reader.optimizer_state(name, start, stop)
                if name == "c" or start == stop:
                    assert state == {}
                else:
                    assert torch.equal(state["exp_avg"], 2 * out)
                    here = [element for element in FIRST_ELEMENTS[name] if start <= element < stop]
                    assert torch.equal(state["second_moment"], 3 * tensor.flatten()[here])
                    assert set(state) == {"exp_avg", "second_moment"}
            assert reader.optimizer_steps(name) == (0 if name == "c" else 5)
        assert torch.equal(reader.buffers()["router.bias"], torch.arange(4.0))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027])
def test_a_file_gets_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "x.safetensors"
    with pytest.raises(OSError, match="No such file or directory") as error:
        write_tensors(missing, {"a": torch.zeros(3)})
    assert error.value.filename == str(missing)


def test_training_continues_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library releases the interpreter's lock: another thread counts while it writes."""
    counted, counted_during_write, stop = 0, 0, threading.Event()
    save_file, switch_interval_s = tensors.save_file, sys.getswitchinterval()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    def watched(*arguments: Any) -> None:
        nonlocal counted_during_write
        before = counted
        save_file(*arguments)
        counted_during_write = counted - before

    monkeypatch.setattr(tensors, "save_file", watched)
    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(1e-4)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1 << 26)})  # 256 MB
    finally:
        sys.setswitchinterval(switch_interval_s)
        stop.set()
        thread.join()
    assert counted_during_write > 20_000
