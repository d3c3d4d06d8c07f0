"""lm-evaluation-harness's own model for Hugging Face, on an export, gives what this project's adapter gives."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mythos.data.format import BOS
from mythos.eval.requests import score
from mythos.export import load_exported
from tests.export.conftest import VOCABULARY, write_export
from tests.harness_task import questions, write_task
from tests.require import missing
from tests.tiny import tiny_config

ITEMS, DEPTH, LONGEST = 200, 5, 24
TEXT = "The quick brown fox jumps over the lazy dog; caf\u00e9, \u4e2d\u6587 and \U0001f600. "


def log_likelihoods(model: Any, task: str) -> list[tuple[float, bool]]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    only = TaskManager(include_defaults=False)  # the file of the task says everything
    samples = simple_evaluate(model, tasks=[task], bootstrap_iters=0, task_manager=only)["samples"]["local_words"]
    samples.sort(key=lambda sample: sample["doc_id"])
    return [tuple(answer) for sample in samples for (answer,) in sample["resps"]]


def test_log_likelihoods_of_their_model_on_the_export_are_ours(
    tokenizer: Tokenizer, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        missing("no lm-evaluation-harness here (the extra `eval`)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from lm_eval.models.huggingface import HFLM

    from mythos.eval.harness import MythosLM

    sizes = {"model__vocabulary_size": VOCABULARY, "data__sequence_length": LONGEST}
    write_export(tiny_config("mythos", tiny_data, tmp_path / "run", **sizes), tokenizer, tmp_path / "out")
    options = {"add_bos_token": True, "batch_size": 7, "device": "cpu", "dtype": "float32", "depth": DEPTH}
    theirs = HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, **options)
    model = load_exported(tmp_path / "out")

    def forward(tokens: torch.Tensor, targets: None, plan: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, targets, plan)

    ours = MythosLM(
        lambda requests: score(forward, requests, DEPTH, 200, LONGEST, torch.device("cpu")),
        lambda prompt: [],
        Tokenizer.from_str(tokenizer.to_str()),
        BOS,
        LONGEST,
    )
    # Questions of which the longest do not fit into the model.
    task = write_task(tmp_path, "local_words", questions(TEXT, ITEMS, repeats=4))
    expected, found = log_likelihoods(theirs, task), log_likelihoods(ours, task)
    assert len(expected) == 3 * ITEMS
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(total, 3) for total, _ in expected}) > 100
