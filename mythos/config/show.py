"""The resolved configuration as YAML with the meaning of every option beside it."""

import dataclasses
import json
from typing import Any

import yaml

from mythos.config.load import to_dict
from mythos.config.schema import Config

COMMENT_COLUMN = 48


def documented_yaml(config: Config) -> str:
    """YAML that loads back to the same configuration, with one comment per line."""
    return "".join(line + "\n" for line in _lines(config, to_dict(config), ""))


def _lines(section: Any, values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in section.__pydantic_fields__.items():
        value, child = values[name], getattr(section, name)
        nested = dataclasses.is_dataclass(child)
        text = f"{indent}{name}:" if nested else f"{indent}{name}: {_scalar(value)}"
        lines.append(f"{text:<{COMMENT_COLUMN}}  # {field.description}")
        if nested:
            lines += _lines(child, value, indent + "  ")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=2**30).removesuffix("\n...\n").strip()
