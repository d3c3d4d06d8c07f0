"""Run directories that were written here instead of trained, with known losses."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mythos.config.derive import tokens_per_step
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.config.yaml_file import dump
from tests.tiny import tiny_config

FLOPS_PER_STEP = {"dense": 1e9, "looped": 3e9, "published": 3e9}
SECONDS = 2.0


def write_run(
    directory: Path,
    model: str,
    seed: int,
    loss: Callable[[int], float],
    done: int | None = None,
    tokenizer: str = "{}",
    **overrides: Any,
) -> Config:
    """A run of 100 steps with a validation every 10; ``done``: killed after that step; ``loss`` is that at a step."""
    options = {"train__steps": 100, "seed": seed, "eval__every": 10} | overrides
    config = tiny_config(model, Path("data"), directory, 1, **options)
    directory.mkdir(parents=True)
    (directory / "checkpoints").mkdir()
    (directory / "config.yaml").write_text(dump(to_dict(config)), encoding="utf-8")
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    events: list[dict[str, Any]] = [{"event": "started", "command": "mythos train", "ranks": 1}]
    events += [{"event": "ended", "exit_code": 0}] if done is None else []
    write_lines(directory / "events.jsonl", events)
    lines: list[dict[str, Any]] = [{"step": 0, "val/loss": loss(0)}]
    for step in range(1, (done or config.train.steps) + 1):
        lines.append(training_line(step, step * tokens_per_step(config), FLOPS_PER_STEP[model]))
        lines += [{"step": step, "val/loss": loss(step)}] if step % config.eval.every == 0 else []
    write_lines(directory / "metrics.jsonl", lines)
    return config


def training_line(step: int, tokens: float, flops_of_step: float, **more: float) -> dict[str, float]:
    """Of metrics.jsonl."""
    speed = {"perf/step_seconds": SECONDS, "perf/model_flops_per_second": flops_of_step / SECONDS}
    return {"step": step, "train/loss": 1.0, "train/tokens": float(tokens), **speed, **more}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_evaluation(
    run: Path,
    step: int,
    nats_N: np.ndarray,
    depth: int | None,
    number: int = 0,
    settings: Mapping[str, Any] | None = None,
    **items: np.ndarray,
) -> None:
    """Documents of 10 tokens and 40 bytes, unless ``items`` says otherwise.

    Args:
        number: of several evaluations of this step, in the order of their files.
        settings: that differ from the ordinary ones.
    """
    count, suffix = len(nats_N), "" if depth is None else f"_depth_{depth}"
    arrays = {
        "documents": np.arange(count),
        "documents_tokens": np.full(count, 10),
        "documents_bytes": np.full(count, 40.0),
        f"documents_nats{suffix}": nats_N,
    } | items
    (run / "evaluations").mkdir(exist_ok=True)
    path = run / "evaluations" / f"step_{step:08d}_{number}.json"
    np.savez(path.with_suffix(".npz"), **arrays)
    depths = {"depths": None if depth is None else [depth]}
    result: dict[str, Any] = {"step": step, "data": "a", "wanted": {"documents": count}, "eval": depths}
    result["precision"] = "fp32"
    for name, value in (settings or {}).items():
        result[name] = result[name] | value if isinstance(value, Mapping) else value
    path.write_text(json.dumps(result), encoding="utf-8")
