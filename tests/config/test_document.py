from pathlib import Path

from mythos.config.document import document
from mythos.config.tree import options

FILE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_file_is_what_the_schema_gives() -> None:
    stale = "stale: run `python -m mythos.config.document > docs/configuration.md`"
    assert FILE.read_text(encoding="utf-8") == document(), stale


def test_every_option_has_a_row_or_a_table() -> None:
    text = document()
    for path in options():
        assert f"| `{path}` |" in text or f"\n## {path}" in text, path
