"""Our files are safetensors files, and parts of parameters come back from any division into pieces."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mythos.checkpoint import layout
from mythos.checkpoint.pieces import BUFFER, PieceReader
from mythos.checkpoint.tensors import write_tensors
from mythos.files import hash_file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_the_library_reads_what_we_write(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": (100 * torch.randn(7, 5, generator=generator)).to(dtype),
        "part": (100 * torch.randn(30, generator=generator)).to(dtype)[3:20],
        "empty": torch.zeros(0, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    written = write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert written == (tmp_path.joinpath("x.safetensors").stat().st_size, hash_file(tmp_path / "x.safetensors"))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name]), name


def test_parts_come_back_from_any_division(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    whole = {"a": torch.randn(6, 7), "b": torch.randn(50), "c": torch.randn(1)}
    for ranks in (1, 2, 3, 8):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        weights: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        optimizer: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        parameters = {}
        for name, tensor in whole.items():
            cuts = [0, *sorted(generator.integers(0, tensor.numel() + 1, ranks - 1)), tensor.numel()]
            pieces = []
            for rank, (start, stop) in enumerate(pairwise(cuts)):
                if start < stop:
                    flat = tensor.flatten()[start:stop].contiguous()
                    weights[rank][name] = flat
                    if name != "c":  # has had no update yet
                        optimizer[rank][f"{name}.exp_avg"] = 2 * flat
                    pieces.append((rank, int(start), int(stop), 0.0 if name == "c" else 5.0))
            parameters[name] = layout.Parameter(tuple(tensor.shape), tuple(pieces))
        weights[0][f"{BUFFER}router.bias"] = torch.arange(4.0)
        for rank in range(ranks):
            write_tensors(directory / layout.weights_file(rank), weights[rank], {})
            write_tensors(directory / layout.optimizer_file(rank), optimizer[rank], {})
        layout.Manifest(1, {}, parameters).save(directory)

        reader = PieceReader(directory)
        for name, tensor in whole.items():
            assert torch.equal(reader.whole(name), tensor)
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
                    assert set(state) == {"exp_avg"}
            assert reader.optimizer_steps(name) == (0 if name == "c" else 5)
        assert torch.equal(reader.buffers()["router.bias"], torch.arange(4.0))
