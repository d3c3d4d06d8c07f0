"""The resolved configuration as YAML with the meaning of every option beside it."""

import dataclasses
from typing import Any

from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.config.yaml_file import dump_inline

COMMENT_COLUMN = 48


def documented_yaml(config: Config) -> str:
    """YAML that loads back to the same configuration, with one comment per line."""
    return "".join(line + "\n" for line in _lines(config, to_dict(config), ""))


def _lines(section: Any, values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in section.__pydantic_fields__.items():
        value, child = values[name], getattr(section, name)
        nested = dataclasses.is_dataclass(child)
        text = f"{indent}{name}:" if nested else f"{indent}{name}: {dump_inline(value)}"
        lines.append(f"{text:<{COMMENT_COLUMN}}  # {field.description}")
        if nested:
            lines += _lines(child, value, indent + "  ")
    return lines
