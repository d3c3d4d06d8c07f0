"""A task of lm-evaluation-harness in local files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MULTIPLE_CHOICE = (
    "output_type: multiple_choice\n"
    'doc_to_text: "{{question}}"\ndoc_to_choice: "{{answers}}"\ndoc_to_target: "{{right}}"\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
)
"""Of items with ``question``, ``answers`` and ``right``, the number of the right one."""


def write_task(directory: Path, name: str, items: Sequence[dict[str, Any]], rest: str = MULTIPLE_CHOICE) -> str:
    """Write the items and the task's YAML file, which ends with ``rest``; returns the path of that file."""
    data, task = directory / f"{name}.jsonl", directory / f"{name}.yaml"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n{rest}",
        encoding="utf-8",
    )
    return str(task)


def questions(text: str, count: int, repeats: int = 1) -> list[dict[str, Any]]:
    """Items of words of the text; the words of a question are repeated up to ``repeats`` times."""
    words = text.split()
    return [
        {
            "question": " ".join(words[n % 9 : n % 9 + 3] * (1 + n % repeats)),
            "answers": [words[n % 11], words[n % 7], "x"],
            "right": n % 3,
        }
        for n in range(count)
    ]
