"""Asynchronous saves, and runs that are killed, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mythos.checkpoint.saver import Saver
from mythos.checkpoint.snapshot import world_shape
from mythos.config.load import to_dict
from mythos.engine.engine import TrainingEngine
from mythos.errors import PREEMPTED
from mythos.run.metrics import read_metrics
from tests.gpu.data import write_random_tokens
from tests.gpu.program import main
from tests.gpu.training import config_for, largest_difference, train
from tests.spawn import ROOT, Job, environments
from tests.tiny import tiny_config

Record = Callable[[str, float, str], None]
STEPS = 12
LIMIT_S = 300


def saves(device: torch.device, directory: Path) -> tuple[bool, float, float]:
    """Whether an asynchronous save writes the bytes of a synchronous one; its stall and the time of the bare copy."""
    size = {"cpu": {}, "cuda": {"model__width": 2048, "model__vocabulary_size": 32_768}}[device.type]
    config = config_for(device, "looped-moe", parallel__zero_stage=3, **size)
    engine = TrainingEngine(config, device)
    train(engine, config, 1)
    contents, stall = [], 0.0
    for mode in ("sync", "async"):
        options = config_for(device, "looped-moe", checkpoint__mode=mode, checkpoint__keep_last=1).checkpoint
        saver = Saver(directory / mode, options, engine)
        for step in (1, 2):  # the first save allocates the memory that the second one uses again
            _wait_for(device)
            begun = time.perf_counter()
            saver.start(step, {"step": 1, "world": world_shape(engine)})
            stall = time.perf_counter() - begun
            saver.wait_until_saved()
        newest = directory / mode / "step_00000002"
        contents.append({path.name: path.read_bytes() for path in newest.iterdir() if path.suffix == ".safetensors"})
    return contents[0] == contents[1] and bool(contents[0]), stall, _seconds_of_a_copy(device, engine)


def _seconds_of_a_copy(device: torch.device, engine: TrainingEngine) -> float:
    """Of weights and optimizer state to memory that is allocated already."""
    tensors = [
        tensor
        for shard in engine.shards()
        for tensor in (
            shard.weights(shard.start, shard.stop),
            *shard.optimizer_state(shard.start, shard.stop).values(),
        )
    ]
    copies = [torch.empty_like(each, device="cpu", pin_memory=device.type == "cuda") for each in tensors]
    _wait_for(device)
    begun = time.perf_counter()
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    _wait_for(device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def test_an_asynchronous_save(device: torch.device, here: Callable[..., Any], record: Record, tmp_path: Path) -> None:
    for mode in ("sync", "async"):
        (tmp_path / mode).mkdir()
    same, stall, copy = here(saves, tmp_path)
    record("seconds that training waits", stall, f"<= 1.5 times a copy, {1.5 * copy:.3g}")
    assert same
    if device.type == "cuda":  # on a CPU both take a moment, and the machine may be busy
        assert stall <= 1.5 * copy


def attempt(device: torch.device, config_file: Path, *signal_and_pass: str) -> int:
    """The exit code of a training process: of the suite's fork server on a CPU, a new one on a GPU."""
    output = config_file.with_suffix(".output")
    if device.type == "cpu":
        return Job(1, main, str(config_file), *signal_and_pass, output=output).wait(LIMIT_S)
    environ = {**os.environ, **environments(1)[0], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.gpu.program", str(config_file), *signal_and_pass]
    with output.open("a", encoding="utf-8") as file:
        return subprocess.run(command, env=environ, stdout=file, stderr=file, cwd=ROOT, timeout=LIMIT_S).returncode


def curve(run: Path) -> list[float]:
    """The loss of each step."""
    found = {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}
    return [found[step] for step in range(1, STEPS + 1)]


def test_a_deterministic_run_twice(device: torch.device, record: Record, tmp_path: Path) -> None:
    """In processes of their own, because the setting holds for the life of a process."""
    data, curves = write_random_tokens(tmp_path / "data"), []
    for name in ("first", "second"):
        options = {"device": "auto", "deterministic": True, "train__steps": STEPS, "precision": "bf16"}
        config_file = tmp_path / f"{name}.json"
        config = tiny_config("published", data, tmp_path / name, **options)
        config_file.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        assert attempt(device, config_file) == 0
        curves.append(curve(tmp_path / name))
    difference = largest_difference(*curves)
    record("losses of a deterministic run, twice", difference, "0")
    assert difference == 0


def test_a_stopped_and_a_killed_run_resume(device: torch.device, record: Record, tmp_path: Path) -> None:
    data = write_random_tokens(tmp_path / "data")
    curves = {}
    for name in ("uninterrupted", "interrupted"):
        run = tmp_path / name
        options = {"device": device.type, "train__steps": STEPS, "checkpoint__every": 2, "precision": "auto"}
        config_file = tmp_path / f"{name}.json"
        config_file.write_text(json.dumps(to_dict(tiny_config("looped-moe", data, run, **options))), encoding="utf-8")
        if name == "interrupted":
            assert attempt(device, config_file, "SIGTERM", "5") == PREEMPTED
            assert (run / "checkpoints" / "step_00000005").exists(), "the step was finished and saved"
            assert attempt(device, config_file, "SIGKILL", "4") == -signal.SIGKILL
        assert attempt(device, config_file) == 0
        curves[name] = curve(run)
    difference = largest_difference(curves["interrupted"], curves["uninterrupted"])
    record("losses after a stop and a kill", difference, "<= 1e-3")
    assert difference <= 1e-3
