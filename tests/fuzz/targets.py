"""The readers of files, each with a valid file to begin with, and damaged files for them.

``CORPUS`` holds damage that has been found by hand; hypothesis adds flipped, removed and repeated bytes, and values of
other types at any place of a JSON file.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from hypothesis import strategies as st

from data_prep.parquet_file import ParquetFile
from data_prep.parts import read_record
from data_prep.tokenizer_file import agreed_validation_percent, load_tokenizer
from mythos.checkpoint import layout, overview
from mythos.checkpoint.manifest import FileRecord, _digest, optimizer_file, weights_file
from mythos.checkpoint.reader import CheckpointReader
from mythos.checkpoint.tensors import write_tensors
from mythos.config.load import load_run
from mythos.data.dataset import TokenDataset
from mythos.data.format import SPLITS, fingerprint
from mythos.data.open import read_tokenizer
from mythos.errors import UserError
from mythos.export import INDEX_FILE, load_exported
from mythos.model import build_structure
from mythos.run.describe import describe
from mythos.run.directory import CONFIG_FILE, MANIFEST_FILE, STATE_FILE, RunDirectory, prepare
from mythos.run.journal import STARTED, append_event
from mythos.run.lock_file import look
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from mythos.train.state import RunState
from tests.checkpoint.test_layout import write
from tests.gpu.data import ROWS, write_random_tokens
from tests.tiny import tiny_config

CORPUS = Path(__file__).parent / "corpus"
EXPORTED_WEIGHTS = "model-00001-of-00001.safetensors"
VALUES = [None, True, -1, 0, 2**31, 10**30, 10**400, 1e308, "", "../x", "\x1b[2J", "x" * 5000, [], {}, [[]], {"a": 1}]


@dataclass(frozen=True)
class Target:
    """A file and what reads it."""

    file: Path
    content: bytes
    read: Callable[[], object]


def targets(place: Path) -> dict[str, Target]:
    """All targets, with their files below ``place``."""
    run, data = make_run(place / "run"), make_data(place / "data")
    checkpoint = run.checkpoints / layout.tag(7)
    tokenizer = data / "tokenizer.json"
    parts = place / "parts"
    parts.mkdir()
    for split in SPLITS:
        (parts / f"p.{split}").write_bytes(bytes(40))
    part = {"documents": 1, "documents_cut": 0, "text_bytes": 3, "text_tokens": 0, "tokens_dropped": 0, "rows": 1}
    (parts / "p.json").write_text(json.dumps(dict.fromkeys(SPLITS, part | {"tail": [[4, False]]})), encoding="utf-8")
    note = data / "tokenizer.training.json"
    hashes = {"tokenizer_sha256": "0" * 64, "validation_percent": 1.0}
    counts = {"text_bytes": 10, "held_out_bytes": 5, "held_out_tokens": 2}
    note.write_text(json.dumps(hashes | counts), encoding="utf-8")

    texts, exported = make_parquet(place / "texts.parquet"), make_export(place / "exported", run)

    def state() -> None:
        RunState.from_dict(checkpoint, layout.read_state(checkpoint))

    readers: dict[Path, Callable[[], object]] = {
        run.metrics: lambda: (read_metrics(run.path), describe(read_status(run.path))),
        run.events: lambda: describe(read_status(run.path)),
        run.environment: lambda: describe(read_status(run.path)),
        run.config: lambda: (describe(read_status(run.path)), load_run(run.config)),
        run.latest: lambda: (layout.resumable_checkpoints(run.checkpoints), describe(read_status(run.path))),
        run.lock: lambda: look(run.lock),
        checkpoint / STATE_FILE: lambda: (describe(read_status(run.path)), state()),
        checkpoint / MANIFEST_FILE: lambda: read_checkpoint(run, checkpoint, None),
        checkpoint / weights_file(0): lambda: read_checkpoint(run, checkpoint, weights_file(0)),
        checkpoint / optimizer_file(0): lambda: read_checkpoint(run, checkpoint, optimizer_file(0)),
        data / "manifest.json": lambda: (fingerprint(data), TokenDataset(data, "train")),
        data / "train" / "index.json": lambda: TokenDataset(data, "train"),
        data / "train" / "shard.00000.mds": lambda: TokenDataset(data, "train")[ROWS["train"] - 1],
        tokenizer: lambda: (load_tokenizer(tokenizer), read_tokenizer(tokenizer)),
        note: lambda: agreed_validation_percent(tokenizer, "0" * 64, None),
        parts / "p.json": lambda: read_record(parts, "p", 32, 2),
        texts: lambda: read_parquet(texts),
        exported / INDEX_FILE: lambda: load_exported(exported),
        exported / EXPORTED_WEIGHTS: lambda: load_exported(exported),
    }
    return {
        str(path.relative_to(place)).replace("/", "-"): Target(path, path.read_bytes(), read)
        for path, read in readers.items()
    }


def make_run(path: Path) -> RunDirectory:
    """A run that has trained for seven steps."""
    prepare(tiny_config("looped", path.parent / "data", path), [])
    run = RunDirectory(path)
    append_event(path, STARTED, command="c", ranks=2, expert_parallel_size=1, slurm={"SLURM_JOB_ID": "7"})
    line = {"step": 7, "train/loss": 2.5, "train/tokens": 360, "perf/tokens_per_second": 5e4, "val/loss": 1.0}
    run.metrics.write_text(json.dumps(line) + "\n", encoding="utf-8")
    run.environment.write_text(json.dumps([{"command": "c", "ranks": 1, "slurm": {}}]), encoding="utf-8")
    run.lock.write_text(json.dumps({"key": "k", "host": "h", "process": 1, "has_flock": False}), encoding="utf-8")
    checkpoint = write(run.checkpoints, 7)
    state = RunState({"seed": 1}, "id", 7, 7, samples=14, tokens=360).to_dict() | {"world": {"ranks": 1}}
    (checkpoint / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    sign(checkpoint, STATE_FILE)
    return run


def make_parquet(path: Path) -> Path:
    """A few documents in two row groups."""
    parquet.write_table(pa.table({"text": ["one", "zwei \u00e4", None, "three " * 40]}), path, row_group_size=2)
    return path


def read_parquet(path: Path) -> list[str]:
    """Every document of a file."""
    file = ParquetFile(path, "text", "text")
    return [text for rows in file.row_ranges() for text in file.texts(rows)]


def make_export(path: Path, run: RunDirectory) -> Path:
    """A model of zeros, as `mythos export` writes it."""
    path.mkdir()
    shutil.copyfile(run.config, path / CONFIG_FILE)
    tensors = {name: torch.zeros_like(p) for name, p in build_structure(load_run(run.config)).named_parameters()}
    write_tensors(path / EXPORTED_WEIGHTS, tensors)
    index = {"weight_map": dict.fromkeys(tensors, EXPORTED_WEIGHTS)}
    (path / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return path


def make_data(path: Path) -> Path:
    """A data set of one shard for each split."""
    shutil.copyfile(CORPUS / "tokenizer.json", write_random_tokens(path) / "tokenizer.json")
    return path


def read_checkpoint(run: RunDirectory, checkpoint: Path, changed: str | None) -> None:
    """Verify a checkpoint whose manifest has the right hashes, and read all of it."""
    with suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):  # no JSON: it stays unsigned
        sign(checkpoint, changed)
    overview.list_checkpoints(run.path)
    problems = overview.verify_checkpoints(run.path).problems
    if problems:
        raise UserError(problems[0])
    reader = CheckpointReader(checkpoint)
    for name, parameter in reader.manifest.parameters.items():
        elements = reader.parameter(name).numel()
        assert np.prod(parameter.shape) == elements
        reader.optimizer_state(name, 0, elements)


def sign(checkpoint: Path, changed: str | None) -> None:
    """Give the manifest the hash of a changed file, and its own."""
    path = checkpoint / MANIFEST_FILE
    content = json.loads(path.read_bytes())
    content.pop("xxh3_64", None)
    if changed is not None:
        content["files"][changed] = list(FileRecord.of(checkpoint / changed))
    path.write_text(json.dumps(content | {"xxh3_64": _digest(content)}), encoding="utf-8")


def corpus() -> list[bytes]:
    """Damaged contents that were found by hand."""
    return [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))] + [b"[" * 10**6, b'{"a":' * 10**5]


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Variants of a valid file."""
    place = st.integers(0, len(valid))

    def cut(first: int, last: int, between: bytes) -> bytes:
        return valid[: min(first, last)] + between + valid[max(first, last) :]

    found = [
        st.builds(cut, place, place, st.binary(max_size=8)),
        st.builds(lambda at, text: cut(at, at + 1, text), place, st.binary(min_size=1, max_size=1)),
        st.binary(max_size=200),
        st.sampled_from(corpus()),
    ]
    with suppress(ValueError):
        tree = json.loads(valid)
        places = list(_places(tree))
        found.append(st.builds(lambda path, value: _changed(tree, path, value), st.sampled_from(places), _json()))
    return st.one_of(found)


def _json() -> st.SearchStrategy[Any]:
    return st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers())


def _places(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in children:
        yield from _places(child, (*path, name))


def _changed(tree: Any, path: tuple[str | int, ...], value: Any) -> bytes:
    copy = json.loads(json.dumps(tree))
    if not path:
        return json.dumps(value).encode()
    parent = copy
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    return json.dumps(copy).encode()


def try_one(target: Target, content: bytes) -> bool:
    """Read a damaged file; returns whether it was refused.

    Everything but a UserError is raised, as is one of several lines, unless it is a configuration's list of problems.
    """
    beside = {path: path.read_bytes() for path in target.file.parent.iterdir() if path.is_file()}
    try:
        target.file.write_bytes(content)
        target.read()
    except UserError as error:
        first, *others = str(error).splitlines()
        if not (first.endswith(f"in {target.file}:") and all(line.startswith("  ") for line in others)) and others:
            raise AssertionError(f"not one line: {error!r}") from error
        return True
    finally:
        for path, before in beside.items():
            path.write_bytes(before)
    return False
