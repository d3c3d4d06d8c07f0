"""YAML files and key=value -> one plain tree."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from mythos.config import yaml_file
from mythos.config.option import needs_of
from mythos.config.tree import default_kind, find, get, has, options, options_of_others, remove, unions
from mythos.config.values import is_free_text, named_sections, takes_null, typed
from mythos.errors import UserError
from mythos.readers import read_yaml

CONFIG_FILE = "config.yaml"
"""The configuration in a run directory, which the run itself wrote."""
CHECKPOINT_DIRECTORY = "checkpoints"
"""The directory next to it, which every run creates."""
RECIPE = "recipe"
"""``recipe: true`` in a file: it is for several models, and what the model does not have is left out of it."""
RESTORE = "restore it, or give another run directory"


def merge(
    files: Sequence[str | Path], overrides: Sequence[str], saved: bool = False, resolve: bool = True
) -> dict[str, Any]:
    """Merge YAML files, of which later ones win, then the overrides as one more layer.

    A layer that chooses another kind (``optim.kind=adamw``) or switches something off (``sample.tokens=0``) also
    removes the options that now have no effect from the layers before it, so no file has to be edited. A named section
    that is null (``data.sources.b=null``) removes that of the layers before it. A recipe's options that have no effect
    with the model, which is in the layers before it, are left out.

    Args:
        saved: Mythos wrote the files, perhaps in version 0.1, which wrote options without effect as well.
        resolve: replace references by what they refer to.

    Raises:
        UserError: a file or an override cannot be read.
    """
    layers = [_read(file, saved) for file in files]
    given: dict[str, Any] = {}
    for override in overrides:
        _update(given, _parse(override))
    merged: dict[str, Any] = {}
    for layer, file in zip((*layers, given), (*files, None), strict=True):
        if file is not None and layer.pop(RECIPE, False):
            _keep_what_applies(layer, merged, file)
        for path in _superseded(merged, layer):
            remove(merged, path)
        _check_removed(merged, layer)
        _update(merged, layer)
        _drop_null_sections(merged)
    if resolve:
        resolve_references(merged)
    tree = typed(merged)
    assert isinstance(tree, dict)
    return tree


def _read(file: str | Path, saved: bool) -> dict[str, Any]:
    layer = _content_of_run(Path(file)) if saved else _content(file)
    _refuse_missing(layer, str(file))
    layer = typed(layer)
    assert isinstance(layer, dict)
    if saved or (Path(file).name == CONFIG_FILE and (Path(file).parent / CHECKPOINT_DIRECTORY).is_dir()):
        _keep_effective(layer)
    return layer


def _content(file: str | Path) -> dict[str, Any]:
    """A file that the user gives, which may also be a pipe."""
    try:
        layer = yaml_file.parse(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        raise UserError(f"{file}: must hold options as `key: value`, not {type(layer).__name__}")
    return layer


def _content_of_run(file: Path) -> dict[str, Any]:
    return read_yaml(file, yaml_file.parse, TypeAdapter(dict[str, Any]), RESTORE)


def read_saved(file: Path) -> dict[str, Any]:
    """A run's own file, without the options of other kinds, which version 0.1 wrote. Raises UserError."""
    layer = typed(_content_of_run(file))
    if not isinstance(layer.get("model"), dict):
        raise UserError(f"{file}: damaged, not a configuration: {RESTORE}")
    _remove_other_kinds(layer)
    resolve_references(layer)
    return layer


def _keep_effective(layer: dict[str, Any]) -> None:
    """Remove what has no effect from a run's own file, which version 0.1 wrote with the options of every kind.

    The user did not give these options, so they are not errors.
    """
    _remove_other_kinds(layer)
    for path, field in options().items():
        needs = needs_of(field)
        if needs and (not has(layer, needs.path) or _switched_off(layer, path)):
            remove(layer, path)


def _keep_what_applies(layer: dict[str, Any], lower: dict[str, Any], file: str | Path) -> None:
    """Remove a recipe's options that have no effect because of the model in the layers before. Raises UserError."""
    if get(lower, "model.kind") is None:
        raise UserError(f"{file}: a recipe comes after the model: give a file of configs/model before it")
    together = copy.deepcopy(lower)
    _update(together, layer)
    for union in unions():
        if union.startswith("model"):
            for name in options_of_others(union, get(together, f"{union}.kind")):
                remove(layer, f"{union}.{name}")
    for path, field in options().items():
        needs = needs_of(field)
        if needs and needs.path.startswith("model.") and has(layer, path):
            found = get(together, needs.path) if has(together, needs.path) else options()[needs.path].default
            if not needs.met(found):
                remove(layer, path)


def _remove_other_kinds(layer: dict[str, Any]) -> None:
    for union in unions():
        for name in options_of_others(union, get(layer, f"{union}.kind")):
            remove(layer, f"{union}.{name}")


def _parse(override: str) -> dict[str, Any]:
    """One override as a tree. Text options take the text as it is, all others YAML."""
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"{override!r}: an override has the form key=value, for example train.steps=100")
    field = find(path)
    value: Any = text
    if field is None or not is_free_text(field):
        try:
            value = yaml_file.parse(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: not valid: {' '.join(str(error).split())}") from None
    elif text == "null" and takes_null(field):
        value = None
    for name in reversed(path.split(".")):
        value = {name: value}
    _refuse_missing(value, repr(override))
    return typed(value)


def _refuse_missing(layer: dict[str, Any], where: str) -> None:
    """A missing value would otherwise be taken for text."""
    if missing := sorted(_missing(layer)):
        raise UserError(f"{where}: {missing[0]} = '???': give a value")


def _missing(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{name}.")
        elif isinstance(value, yaml_file.Missing):
            yield f"{prefix}{name}"


def _update(lower: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Set every option of the layer in the tree below it."""
    for name, value in layer.items():
        if isinstance(value, dict):
            section = lower.get(name)
            lower[name] = section if isinstance(section, dict) else {}
            _update(lower[name], value)
        else:
            lower[name] = value


def _check_removed(lower: dict[str, Any], layer: dict[str, Any]) -> None:
    """A removal must have an effect. Raises UserError."""
    for path in named_sections():
        for name, value in (get(layer, path) or {}).items():
            if value is None and not has(lower, f"{path}.{name}"):
                known = ", ".join(get(lower, path) or {}) or "none"
                raise UserError(f"{path}.{name} = None: there is none to remove; those before it are: {known}")


def _drop_null_sections(tree: dict[str, Any]) -> None:
    for path in named_sections():
        sections = get(tree, path)
        if sections is None:
            remove(tree, path)
        elif isinstance(sections, dict):
            for name in [name for name, value in sections.items() if value is None]:
                del sections[name]


def _superseded(lower: dict[str, Any], layer: dict[str, Any]) -> list[str]:
    """Options of the layers before this one that have no effect any more because of a choice made in this layer."""
    superseded = []
    for union in unions():
        kind, before = get(layer, f"{union}.kind"), get(lower, f"{union}.kind")
        if kind is not None and kind != (before or default_kind(union)):
            superseded += [f"{union}.{name}" for name in options_of_others(union, kind)]
    return superseded + [path for path in options() if _switched_off(layer, path)]


def _switched_off(layer: dict[str, Any], path: str) -> bool:
    """Whether the layer itself switches off what the option needs, directly or through another option.

    What a reference to another option will give is not known yet.
    """
    needs = needs_of(options()[path])
    if needs is None:
        return False
    if has(layer, needs.path):
        found = get(layer, needs.path)
        if not needs.met(found) and not (isinstance(found, str) and "${" in found):
            return True
    return _switched_off(layer, needs.path)


def resolve_references(tree: dict[str, Any]) -> None:
    """Replace references such as ``${seed}`` or ``${oc.env:HOME}`` by what they refer to. Raises UserError."""
    try:
        config = OmegaConf.create(tree)
    except (OmegaConfBaseException, RecursionError) as error:
        raise _reference_error(tree, "", error) from None
    _resolve_in(tree, config, "")


def _resolve_in(tree: Any, config: Any, prefix: str) -> None:
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            _resolve_in(value, config[name], f"{prefix}{name}.")
        elif isinstance(value, str) and "${" in value:
            try:
                found = config[name]
                tree[name] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
            except (OmegaConfBaseException, RecursionError) as error:
                raise _reference_error(tree, f"{prefix}{name}", error) from None


def _reference_error(tree: Any, path: str, error: Exception) -> UserError:
    path = path or getattr(error, "full_key", None) or ""
    value = get(tree, path) if get(tree, path) is not None else tree.get(path.rpartition(".")[2])
    problem = str(error).splitlines()[0].rstrip(".")
    return UserError(
        f"{path} = {value!r}: {problem}: ${{...}} refers to an option, ${{oc.env:HOME}} to an environment variable, "
        "and \\${ is the text ${"
    )
