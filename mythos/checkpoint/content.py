"""Compares the tensors in a checkpoint's safetensors files with the manifest. Reads only their headers."""

from collections.abc import Mapping
from pathlib import Path

from mythos.checkpoint.manifest import Manifest, SavedParameter, ShardRecord, weights_file
from mythos.readers import one_line
from mythos.run.directory import STATE_FILE

BUFFER = "buffer:"
"""Prefix of the model's buffers, which are not sharded and are in the first weights file."""
DTYPE = "F32"


def wrong_tensors(path: Path, manifest: Manifest) -> str | None:
    """Why a file, which exists, does not hold the tensors of its shards; None if it does, or holds no tensors."""
    if path.name == STATE_FILE:
        return None
    from safetensors import SafetensorError, safe_open  # a list of checkpoints does not need it

    number = int(path.stem.split("_")[1])
    shards = manifest.shards_by_file.get(number, {})
    try:
        with safe_open(str(path), "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            tensors = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        return f"{path}: damaged ({one_line(str(error))})"
    if path.name == weights_file(number):
        problem = _wrong_weights(number, shards, tensors)
    else:
        problem = _wrong_optimizer_state(manifest.parameters, shards, tensors)
    return None if problem is None else f"{path}: {problem}, which contradicts the manifest"


Tensors = Mapping[str, tuple[str, list[int]]]
"""The dtype and the shape of each tensor."""


def _wrong_weights(number: int, shards: Mapping[str, ShardRecord], tensors: Tensors) -> str | None:
    found = {name for name in tensors if number > 0 or not name.startswith(BUFFER)}
    for name in sorted(found ^ set(shards)):
        return f"{name} is {'in it' if name in found else 'missing'}"
    problems = (_wrong_tensor(name, shards[name].elements, tensors[name]) for name in sorted(found))
    return next(filter(None, problems), None)


def _wrong_optimizer_state(
    saved: Mapping[str, SavedParameter], shards: Mapping[str, ShardRecord], tensors: Tensors
) -> str | None:
    parts = {key: key.rpartition(".") for key in tensors}
    missing = {name for name, shard in shards.items() if shard.optimizer_steps} - {
        name for name, _, _ in parts.values()
    }
    for name in sorted(missing):
        return f"the state of {name} is missing"
    for key, (name, _, state) in sorted(parts.items()):
        if name not in shards:
            return f"{key} is in it"
        start, stop = (saved[name].state_before(state, element) for element in (shards[name].start, shards[name].stop))
        if problem := _wrong_tensor(key, stop - start, tensors[key]):
            return problem
    return None


def _wrong_tensor(name: str, numbers: int, found: tuple[str, list[int]]) -> str | None:
    expected = (DTYPE, [numbers])
    return None if found == expected else f"{name} has dtype {found[0]} and shape {found[1]}"
