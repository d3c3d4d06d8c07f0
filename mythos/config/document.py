"""docs/configuration.md, from the schema: `python -m mythos.config.document > docs/configuration.md`."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mythos.config.option import LARGEST, change_of, needs_of
from mythos.config.schema import Config
from mythos.config.tree import sections_in, unions

HEAD = """\
# Configuration

Generated from the schema by `python -m mythos.config.document`; do not edit it.

A configuration is one tree of options. It is merged from YAML files, where later files override earlier ones, and
`key=value` arguments, which override the files: `mythos train MODEL.yaml RUN.yaml optim.learning_rate=2e-4`.
`mythos config` prints the resolved tree. All mistakes are reported at once, each with the dotted path, the value and
what would be right.

- Unknown options are errors, and so are options without effect: those that need another option (see the tables), and
  those of another `kind`.
- A file or a command line that chooses another `kind` (`optim.kind=adamw`) or switches a feature off
  (`sample.tokens=0`) also removes that feature's options from the files before it.
- A recipe (`recipe: true` in the file, see `configs/recipe/`) is for several models: options that have no effect with
  the model, which is given before it, are left out. `mythos train MODEL.yaml RECIPE.yaml RUN.yaml`.
- Files are merged option by option: a later file adds to `data.sources`. `data.sources.b=null` removes the source b of
  the files before it, and `data.sources=null` removes all.
- The option's type decides what a value means. Text is taken as it is on the command line, quotes included, and as YAML
  reads it in a file. Numbers are decimal (`1_000`, `1e-3`; `010` is 10), and `2:00` or `on` is refused.
- `${seed}` refers to another option and `${oc.env:HOME}` to an environment variable; `\\${` is the text `${`. A path
  may begin with `~`. An argument with `=` is a file if a slash precedes the `=` or such a file exists.
- Where a table gives no upper bound, a number is at most 10^12.

**May change** says what happens when a run is resumed with another value:

| | |
|---|---|
| free | accepted and logged |
| rate | as free, or as ask if the learning rate at the step where the run resumes would change by more than 1% |
| ask | refused with the difference, unless `--accept OPTION` names it, as the message shows |
| never | refused: the weights or the position in the data would have no meaning |

`--accept` can be repeated. The name of a section (`--accept optim`) accepts all options in it that may change. Prefer
the name of the option: a requeued job has the same arguments, and accepts only what they name. Naming an option that
has not changed is not an error. A change of the content of a data set is accepted by the option that names its
directory (`--accept data.directory`, `--accept data.sources.web.directory`). A run without a checkpoint and without
metrics may start with any configuration. After a change of `optim.kind`, the moments that both kinds have are kept.
"""


def document() -> str:
    """The text of the file."""
    lines = [HEAD, "## Top level", "", *_table(Config, "")]
    sections = {title: (path, section) for title, path, section in _sections(Config, "")}  # each once
    for title, (path, section) in sections.items():
        lines += ["", f"## {title}", "", section.__doc__.replace("``", "`"), "", *_table(section, f"{path}.")]
    return "\n".join(lines) + "\n"


def _sections(section: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(title, dotted path, section) of every section below one, in the order of the schema."""
    for name, field in section.__pydantic_fields__.items():
        path = f"{prefix}{name}" + (".NAME" if get_origin(field.annotation) is dict else "")
        kinds = {inner: kind for kind, inner in unions().get(path, {}).items()}
        for inner in sections_in(field.annotation):
            title = f"{path} ({path}.kind={kinds[inner]})" if inner in kinds else path
            yield title, path, inner
            yield from _sections(inner, f"{path}.")


def _table(section: Any, prefix: str) -> list[str]:
    rows = ["| option | value | default | meaning | may change |", "|---|---|---|---|---|"]
    for name, field in section.__pydantic_fields__.items():
        path = prefix + name
        if (sections_in(field.annotation) and field.is_required()) or field.default_factory not in (None, dict):
            continue  # has a table of its own
        needs = needs_of(field)
        meaning = (field.description or "").replace("|", "\\|")
        if needs is not None:
            values = f"={' or '.join(map(str, needs.values))}" if needs.values else ""
            meaning += f" (needs `{needs.path}{values}`)"
        cells = (f"`{path}`", _type(field), _default(field), meaning, change_of(field))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(bound, name):g}" if getattr(bound, name) < LARGEST else ""
        for bound in field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(bound, name)
    ]
    return ", ".join([_type_name(field.annotation), *filter(None, bounds)])


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return ", ".join(str(choice).lower() if isinstance(choice, bool) else f"`{choice}`" for choice in choices)
    if get_origin(annotation) is dict:
        return "sections by name"
    if get_origin(annotation) is tuple:
        return "list of " + _type_name(get_args(annotation)[0])
    if sections_in(annotation):
        return "section or null" if type(None) in get_args(annotation) else "section"
    if inner := [part for part in get_args(annotation) if part is not type(None)]:
        null = " or null" if type(None) in get_args(annotation) else ""
        return _type_name(inner[0]) + null
    return {"int": "integer", "float": "number", "bool": "true, false", "str": "text"}[annotation.__name__]


def _default(field: FieldInfo) -> str:
    if field.default_factory is dict:
        return "`{}`"
    if field.is_required():
        return "required"
    is_word = isinstance(field.default, str) and field.default
    return f"`{field.default if is_word else json.dumps(field.default)}`"


if __name__ == "__main__":
    print(document(), end="")
