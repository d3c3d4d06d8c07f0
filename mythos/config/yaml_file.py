"""YAML in which every scalar is text: its value follows from the option it is given to (``mythos.config.values``).

YAML 1.1, which PyYAML reads, guesses from the text instead: 010 would be 8, 2:00 would be 120, and ``on`` true.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

NULL, MERGE, MISSING = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge", "!missing"
MARK = "???"
"""An option with this value (without quotes) must be given in a later file."""


class _Reader(yaml.SafeLoader):
    """Reads null, text, lists and mappings, whose keys must be different."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "an option's name must be text", key.start_mark)
            if key.tag == MERGE:
                continue
            if key.value in keys:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_document(self, node: yaml.Node) -> Any:
        try:
            return super().construct_document(node)
        except RecursionError:
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark) from None

    def construct_map(self, node: yaml.MappingNode) -> dict[str, Any]:
        return self.construct_mapping(node)

    def construct_missing(self, node: yaml.Node) -> "Missing":
        return Missing(MARK)


class Missing(str):
    """The mark of a missing value."""

    __slots__ = ()


class Unescaped(str):
    """Text in which ``${`` is a reference."""

    __slots__ = ()


class _Writer(yaml.SafeDumper):
    """Quotes what YAML 1.1 or ``_Reader`` would not read as text."""


_Reader.add_constructor("tag:yaml.org,2002:map", _Reader.construct_map)
_Reader.add_constructor(MISSING, _Reader.construct_missing)
for _class in (_Reader, _Writer):
    _class.add_implicit_resolver(MISSING, re.compile(r"\?\?\?$"), ["?"])


def parse(text: str) -> Any:
    """The content of YAML text. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Reader)
    except RecursionError:
        raise yaml.YAMLError("values are nested too deep") from None


def dump(tree: Mapping[str, Any]) -> str:
    """A tree of values as the text of a YAML file, which ``merge`` reads as the same values."""
    return yaml.dump(_escaped(tree), Dumper=_Writer, sort_keys=False)


def dump_inline(value: Any) -> str:
    """One value on one line, which ``merge`` reads as the same value."""
    style = '"' if isinstance(value, str) else None
    text = yaml.dump(_escaped(value), Dumper=_Writer, default_flow_style=True, default_style=style, width=2**30)
    return text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Any) -> Any:
    """The text ``${`` becomes ``\\${``, which is no reference; every backslash before it is doubled."""
    match value:
        case Unescaped():
            return str(value)
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        case dict():
            return {name: _escaped(inner) for name, inner in value.items()}
        case list():
            return [_escaped(inner) for inner in value]
        case _:
            return value
