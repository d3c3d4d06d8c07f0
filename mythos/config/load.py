"""Configuration files and key=value -> one frozen, validated tree, or one error that lists everything wrong with it."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mythos.config.check import Finding, check
from mythos.config.layers import merge
from mythos.config.model_schema import Dense, Looped
from mythos.config.optim_schema import Optim
from mythos.config.schema import Config
from mythos.config.tree import default_kind, dotted, find, get, kinds_with, options, sections_in, similar, unions
from mythos.errors import UserError

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
_OPTIM: TypeAdapter[Optim] = TypeAdapter(Optim)

ONE_SEQUENCE = {"global_batch_sequences": 1, "micro_batch_sequences": 1}
OUTSIDE_A_RUN: dict[str, Any] = {
    "run": {"directory": "none"},
    "train": {"steps": 1} | ONE_SEQUENCE,
    "optim": {"learning_rate": 1.0},
    "data": {"directory": "none", "sequence_length": 2},
}
"""The required options of a run, for a model's configuration without a run."""
NOT_NEEDED: dict[str, Any] = {
    "run": {"directory": "none"},
    "train": {},
    "optim": {"learning_rate": 1e-4},
    "data": {},
}
"""Of the required options, those that have no effect where there are no data and no files."""


def load(files: Sequence[str | Path], overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Merge YAML files (later ones win), then ``key=value`` overrides, and validate for ``world_size`` processes.

    Raises:
        UserError: one line for each unknown key, wrong type, value out of range and broken rule, all at once.
    """
    return validate(merge(files, overrides), world_size)


def load_model(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Looped | Dense:
    """The model of a configuration in which the sections of a run may be missing.

    What depends on the number of processes is not checked: the batch and the expert-parallel size.

    Raises:
        UserError: as ``load``.
    """
    raw = OUTSIDE_A_RUN | merge(files, overrides)
    for name in ("train", "optim"):  # a recipe gives some of their options
        if isinstance(raw[name], dict):
            raw[name] = OUTSIDE_A_RUN[name] | raw[name]
    if isinstance(raw["train"], dict):
        raw["train"] = raw["train"] | {"global_batch_tokens": None} | ONE_SEQUENCE
    if isinstance(raw.get("parallel"), dict):
        raw["parallel"].pop("expert_parallel_size", None)
    return validate(raw).model


def load_without_data(files: Sequence[str | Path], overrides: Sequence[str], world_size: int, steps: int) -> Config:
    """The configuration of a run of ``steps`` steps that reads no data and writes no files.

    Its directories and learning rate may be missing. Without a global batch, each rank has one micro batch.

    Raises:
        UserError: as ``load``.
    """
    raw = merge(files, overrides)
    for name, section in NOT_NEEDED.items():
        if isinstance(given := raw.get(name, {}), dict):
            raw[name] = section | given
    train, data = raw["train"], raw["data"]
    if isinstance(train, dict):
        train["steps"] = steps
    if isinstance(data, dict) and "sources" not in data:
        data.setdefault("directory", "none")
    if isinstance(train, dict) and not train.keys() & {"global_batch_sequences", "global_batch_tokens"}:
        own = train.get("micro_batch_sequences")
        train["global_batch_sequences"] = own * world_size if isinstance(own, int) else 1
    return validate(raw, world_size)


def load_for_most(files: Sequence[str | Path], overrides: Sequence[str], sizes: Sequence[int]) -> tuple[Config, int]:
    """The configuration and the first of ``sizes``, numbers of processes, that it is valid for.

    Raises:
        UserError: it is valid for none; what is wrong for the first of them.
    """
    merged = merge(files, overrides)
    first_error = None
    for size in sizes:
        try:
            return validate(copy.deepcopy(merged), size), size
        except UserError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def load_run(saved: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """The configuration of a run, from its config.yaml, for work that makes no optimizer step.

    Any number of processes is valid: the global batch is one micro batch of each process, and the expert-parallel size
    is chosen anew unless it is an override.

    Raises:
        UserError: as ``load``; also when there is no run.
    """
    if not saved.exists():
        raise UserError(f"{saved.parent}: not a run directory, it has no {saved.name}: give the directory of a run")
    raw = merge([saved], ["parallel.expert_parallel_size=null", *overrides], saved=True)
    train = raw.get("train")
    if isinstance(train, dict) and isinstance(train.get("micro_batch_sequences"), int):
        train["global_batch_sequences"] = train["micro_batch_sequences"] * world_size
        train["global_batch_tokens"] = None
    return validate(raw, world_size, str(saved))


def validate(raw: dict[str, Any], world_size: int = 1, place: str = "the configuration") -> Config:
    """Validate a plain tree, which was read from ``place``.

    Options that are wrong by themselves do not hide broken rules between the others.
    """
    findings: list[Finding] = []
    config = None
    _fill_kinds(raw)
    try:
        config = _strictly(raw)
    except ValidationError as error:
        findings = [_finding(details) for details in error.errors()]
        config = _without(error, raw)
    if config is not None:
        wrong = {finding.path for finding in findings}
        findings += [
            finding for finding in check(config, world_size) if wrong.isdisjoint((finding.path, *finding.reads))
        ]
    if findings:
        raise UserError(
            f"{len(findings)} problem{'s' if len(findings) > 1 else ''} in {place}:\n"
            + "\n".join(f"  {finding}" for finding in findings)
        )
    assert config is not None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain values, ready for YAML and JSON."""
    return _ADAPTER.dump_python(config, mode="json")


def saved_optim(section: Any) -> Optim | None:
    """The optimizer's options in a run's own file; None where this version does not know them."""
    if not isinstance(section, dict):
        return None
    known = {name: value for name, value in section.items() if find(f"optim.{name}") is not None}
    try:
        return _OPTIM.validate_json(json.dumps({"kind": default_kind("optim")} | known))
    except ValidationError:
        return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _strictly(raw: dict[str, Any]) -> Config:
    """Strict pydantic takes plain dictionaries and lists in JSON only, so the tree goes through JSON."""
    return _ADAPTER.validate_json(json.dumps(raw, default=str))


def _fill_kinds(raw: dict[str, Any]) -> None:
    """pydantic chooses a section by its ``kind`` before it knows defaults."""
    for union in unions():
        section, kind = get(raw, union), default_kind(union)
        if kind is not None and isinstance(section, dict):
            section.setdefault("kind", kind)


def _finding(details: Any) -> Finding:
    path, value = dotted(details["loc"]), details["input"]
    match details["type"]:
        case "unexpected_keyword_argument":
            if find(path) is not None:
                kinds, union = " or ".join(kinds_with(path)), path.rpartition(".")[0]
                return Finding(path, value, f"only {union}.kind={kinds} has it: leave it out, or choose that kind")
            close = similar(path)
            hint = f"did you mean {close}?" if close else "docs/configuration.md lists all options"
            return Finding(path, value, f"unknown option; {hint}")
        case "missing":
            return Finding(path, None, "required; give it in a YAML file or as key=value")
        case "union_tag_not_found":
            return Finding(f"{path}.kind", None, f"required; {details['ctx']['discriminator']} names the kind")
        case "union_tag_invalid":
            return Finding(
                f"{path}.kind",
                value["kind"],
                f"input should be {' or '.join(details['ctx']['expected_tags'].split(', '))}",
            )
        case _:
            return Finding(path, value, details["msg"][0].lower() + details["msg"][1:])


def _without(error: ValidationError, raw: dict[str, Any]) -> Config | None:
    """The tree with wrong options at their defaults (required ones at any valid value), so that rules can be checked.

    None when too much is missing. Rules that read a wrong option are left out by the caller.
    """
    wrong = {dotted(details["loc"]) for details in error.errors()}
    for path in wrong:
        _set(raw, path, None)
    try:
        return _strictly(raw)
    except ValidationError as again:
        for details in again.errors():
            path = dotted(details["loc"])
            field = options().get(path)  # none for a part of a named section
            if path in wrong and field is not None and not sections_in(field.annotation):
                _set(raw, path, "?" if field.annotation is str else 2)
    try:
        return _strictly(raw)
    except ValidationError:
        return None


def _set(tree: Any, path: str, value: Any) -> None:
    """Set the option at a dotted path; None removes it."""
    *sections, name = path.split(".")
    for part in sections:
        tree = tree.get(part)
        if not isinstance(tree, dict):
            return
    if value is None:
        tree.pop(name, None)
    else:
        tree[name] = value
