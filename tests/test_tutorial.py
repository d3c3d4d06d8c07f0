"""The notebook docs/tutorial.ipynb runs with small settings, and keeps its outputs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.cluster import REPO, clean_environment, run

NOTEBOOK = REPO / "docs/tutorial.ipynb"
SMALL = "STEPS, ROWS, VALIDATION_ROWS, DEPTHS = 2, 100, 1, [1, 4]"
LIMIT_S = 300


def cells() -> list[Any]:
    """Those with code, which is plain Python without commands of IPython."""
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_it_runs(tmp_path: Path) -> None:
    program = []
    for cell in cells():
        program.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            program.append(SMALL)
    assert SMALL in program
    (tmp_path / "tutorial.py").write_text("\n".join(program), encoding="utf-8")
    environment = clean_environment() | {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    done = run([sys.executable, tmp_path / "tutorial.py"], LIMIT_S, env=environment)
    assert done.returncode == 0, done.stderr
    assert "loop steps" in done.stdout.splitlines()[-1], "the answers at several depths"


def test_it_keeps_its_outputs_and_no_error() -> None:
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == sum("plt.show()" in "".join(cell["source"]) for cell in cells())
    assert os.path.expanduser("~") not in json.dumps(outputs)
