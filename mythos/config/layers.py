"""YAML files and key=value -> one plain tree."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mythos.config.option import needs_of
from mythos.config.tree import default_kind, options, options_of_others, unions
from mythos.errors import UserError

CONFIG_FILE = "config.yaml"
"""The configuration in a run directory, which the run itself wrote."""
CHECKPOINT_DIRECTORY = "checkpoints"
"""The directory next to it, which every run creates."""


def merge(files: Sequence[str | Path], overrides: Sequence[str], saved: bool = False) -> dict[str, Any]:
    """Merge YAML files, of which later ones win, then the overrides as one more layer.

    A layer that chooses another kind (``optim.kind=adamw``) or switches something off (``sample.tokens=0``) also
    removes the options that now have no effect from the layers before it, so no file has to be edited.

    Args:
        saved: Mythos wrote the files, perhaps in version 0.1, which wrote options without effect as well.

    Raises:
        UserError: a file or an override cannot be read.
    """
    layers = [_read(file, saved) for file in files]
    given = [_parse(override) for override in overrides]
    try:
        merged = OmegaConf.create()
        for layer in (*layers, OmegaConf.merge(*given) if given else OmegaConf.create()):
            for path in _superseded(merged, layer):
                _remove(merged, path)
            merged = OmegaConf.merge(merged, layer)  # type: ignore[assignment]
        tree = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"the configuration cannot be merged: {' '.join(str(error).split())}") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _read(file: str | Path, saved: bool) -> Any:
    try:
        layer = OmegaConf.load(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(layer):
        raise UserError(f"{file}: must hold options as `key: value`, not {type(layer).__name__}")
    _refuse_missing(layer, str(file))
    if saved or (Path(file).name == CONFIG_FILE and (Path(file).parent / CHECKPOINT_DIRECTORY).is_dir()):
        _keep_effective(layer)
    return layer


def without_other_kinds(saved: dict[str, Any]) -> dict[str, Any]:
    """The content of a run's own file without the options of kinds that it does not use, which version 0.1 wrote."""
    layer = OmegaConf.create(saved)
    _remove_other_kinds(layer)
    tree = OmegaConf.to_container(layer, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _keep_effective(layer: Any) -> None:
    """Remove what has no effect from a run's own file, which version 0.1 wrote with the options of every kind.

    The user did not give these options, so they are not errors.
    """
    _remove_other_kinds(layer)
    for path, field in options().items():
        if (needs := needs_of(field)) and not needs.met(OmegaConf.select(layer, needs.path)):
            _remove(layer, path)


def _remove_other_kinds(layer: Any) -> None:
    for union in unions():
        kind = OmegaConf.select(layer, f"{union}.kind")
        for name in options_of_others(union, kind):
            _remove(layer, f"{union}.{name}")


def _parse(override: str) -> Any:
    if "=" not in override:
        raise UserError(f"{override!r}: an override has the form key=value, for example train.steps=100")
    try:
        layer = OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{override!r}: not valid: {' '.join(str(error).split())}") from None
    _refuse_missing(layer, repr(override))
    return layer


def _refuse_missing(layer: Any, where: str) -> None:
    """OmegaConf's mark for a missing value would silently leave an earlier layer's value in place."""
    if missing := sorted(_missing(OmegaConf.to_container(layer, resolve=False))):
        raise UserError(f"{where}: {missing[0]} = '???': give a value")


def _missing(tree: Any, prefix: str = "") -> Iterator[str]:
    """The options with OmegaConf's mark. References are not resolved: they may name an option of another layer."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{name}.")
        elif value == "???":
            yield f"{prefix}{name}"


def _superseded(lower: DictConfig, layer: Any) -> list[str]:
    """Options of the layers before this one that have no effect any more because of a choice made in this layer."""
    superseded = []
    for union in unions():
        kind, before = OmegaConf.select(layer, f"{union}.kind"), OmegaConf.select(lower, f"{union}.kind")
        if kind is not None and kind != (before or default_kind(union)):
            superseded += [f"{union}.{name}" for name in options_of_others(union, kind)]
    for path, field in options().items():
        needs = needs_of(field)
        if needs and _holds(layer, needs.path) and not needs.met(OmegaConf.select(layer, needs.path)):
            superseded.append(path)
    return superseded


def _section(tree: Any, path: str) -> Any:
    """The section of an option, None where the tree has none."""
    for part in path.split(".")[:-1]:
        tree = tree.get(part) if OmegaConf.is_dict(tree) else None
    return tree if OmegaConf.is_dict(tree) else None


def _holds(tree: Any, path: str) -> bool:
    section = _section(tree, path)
    return section is not None and path.split(".")[-1] in section


def _remove(tree: Any, path: str) -> None:
    section = _section(tree, path)
    if section is not None:
        section.pop(path.split(".")[-1], None)
