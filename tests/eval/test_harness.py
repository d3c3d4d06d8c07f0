"""The adapter to lm-evaluation-harness against its own model for Hugging Face, on the same tiny model."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mythos.data.format import BOS
from mythos.eval.requests import SMALLEST_INPUT, Prompt, score, windows
from tests.harness_task import questions, write_task
from tests.require import missing
from tests.text_tokenizer import text_tokenizer

CPU = torch.device("cpu")
LONGEST = 24
TEXT = "The quick brown fox jumps over the lazy dog; caf\u00e9, \u4e2d\u6587 and \U0001f600. " * 3


@pytest.fixture(scope="module", autouse=True)
def harness() -> Any:
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        missing("no lm-evaluation-harness here (the extra `eval`)")
    from mythos.eval import harness

    return harness


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer([TEXT])


@pytest.fixture(scope="module")
def net() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LONGEST}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def adapter(
    harness: Any, net: Any, tokenizer: Tokenizer, micro_batch_tokens: int = 200, batches: list[int] | None = None
) -> Any:
    """``batches`` gets the number of requests of each forward pass."""

    def forward(tokens: torch.Tensor, targets: None, plan: None) -> torch.Tensor:
        if batches is not None:
            batches.append(len(tokens))
        with torch.no_grad():
            return net(tokens).logits

    def write(prompt: Prompt) -> list[int]:
        ids = list(prompt.ids)
        for _ in range(prompt.tokens):
            ids.append(int(forward(torch.tensor([ids[-LONGEST:]]), None, None)[0, -1].argmax()))
        return ids

    return harness.MythosLM(
        lambda requests: score(forward, requests, None, micro_batch_tokens, LONGEST, CPU),
        write,
        Tokenizer.from_str(tokenizer.to_str()),
        BOS,
        LONGEST,
    )


@pytest.fixture(scope="module")
def theirs(harness: Any, net: Any, tokenizer: Tokenizer) -> Any:
    return their_model(net, tokenizer, adds_bos=True)


def their_model(net: Any, tokenizer: Tokenizer, adds_bos: bool) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(tokenizer.to_str())
    if adds_bos:
        own.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=BOS, eos_token=BOS, pad_token=BOS)
    return HFLM(pretrained=net, tokenizer=fast, batch_size=3, max_length=LONGEST, add_bos_token=adds_bos, device="cpu")


def requests(pairs: Sequence[Any]) -> list[Any]:
    return [SimpleNamespace(args=pair if isinstance(pair, tuple) else (pair,)) for pair in pairs]


PAIRS = [
    ("", "The quick"),
    ("The quick brown", " fox"),
    ("The quick brown ", "fox jumps over"),  # the space moves to the continuation
    ("caf\u00e9 \u4e2d", "\u6587 and \U0001f600"),
    (TEXT, " The quick brown fox"),  # the context is cut on the left
    ("over", " the lazy dog"),
    ("a\n\n", "b"),
    ("brown", " fox jumps"),
    ("The", " lazy"),
    ("\U0001f600", " and"),
]


@pytest.mark.parametrize("requests_a_batch", [1, 7])
def test_log_likelihoods_are_those_of_their_own_model(
    harness: Any, net: Any, tokenizer: Tokenizer, theirs: Any, requests_a_batch: int
) -> None:
    batches: list[int] = []
    ours = adapter(harness, net, tokenizer, requests_a_batch * SMALLEST_INPUT, batches).loglikelihood(requests(PAIRS))
    assert max(batches) == requests_a_batch
    expected = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_rolling_log_likelihoods_are_those_of_their_own_model(harness: Any, net: Any, tokenizer: Tokenizer) -> None:
    """Theirs puts a BOS before each text by itself; a tokenizer that does so, too, makes it two."""
    theirs = their_model(net, tokenizer, adds_bos=False)
    texts = ["The quick", TEXT, "caf\u00e9 \u4e2d\u6587", TEXT[:40]]
    ours = adapter(harness, net, tokenizer).loglikelihood_rolling(requests(texts))
    assert ours == pytest.approx(theirs.loglikelihood_rolling(requests(texts), disable_tqdm=True), abs=1e-4)


@pytest.mark.parametrize("longest", [1, 4, 7])
def test_windows_are_those_of_the_harness(harness: Any, longest: int) -> None:
    """Contexts and continuations of texts of any length; -1 is the BOS."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in range(1, 30):
        ids = list(range(length))
        expected = [make_disjoint_window(each) for each in get_rolling_token_windows(ids, -1, longest, 1)]
        found = windows([-1, *ids], 1, longest)
        assert [(each.tokens[: each.first].tolist(), each.tokens[each.first :].tolist()) for each in found] == expected


def test_generated_texts_are_those_of_their_own_model(
    harness: Any, net: Any, tokenizer: Tokenizer, theirs: Any
) -> None:
    model = adapter(harness, net, tokenizer)
    options = {"until": [], "max_gen_toks": 10, "do_sample": False}
    asked = requests([("The quick", options), (TEXT, options)])
    free = model.generate_until(asked)
    assert free == theirs.generate_until(asked, disable_tqdm=True)
    assert len(free[0]) > 4
    stop = free[0][3:5]
    (stopped,) = model.generate_until(requests([("The quick", options | {"until": [stop]})]))
    assert stopped == free[0][: free[0].index(stop)]


@torch.no_grad()
def plain_windows(net: Any, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    """Each window predicts ``LONGEST`` tokens of the continuation; the last one has as much before them as fits."""
    ids = [tokenizer.token_to_id(BOS), *tokenizer.encode(context + continuation).ids]
    first, total = 1 + len(tokenizer.encode(context).ids), 0.0
    while first < len(ids):
        end = min(first + LONGEST, len(ids))
        inputs = torch.tensor([ids[max(0, end - 1 - LONGEST) : end - 1]])
        log_p = net(inputs).logits[0].double().log_softmax(-1)[first - end :]
        total += log_p[torch.arange(end - first), ids[first:end]].sum().item()
        first = end
    return total


def test_edge_cases_that_their_own_model_refuses(harness: Any, net: Any, tokenizer: Tokenizer) -> None:
    model = adapter(harness, net, tokenizer)
    assert model.loglikelihood(requests([("", ""), ("The quick", "")])) == [(0.0, True), (0.0, True)]
    (whole,) = model.loglikelihood(requests([("", TEXT)]))  # a continuation longer than the input of the model
    assert whole[0] == model.loglikelihood_rolling(requests([TEXT]))[0]
    (after_text,) = model.loglikelihood(requests([("The quick brown", " fox " + TEXT)]))
    assert after_text[0] == pytest.approx(plain_windows(net, tokenizer, "The quick brown", " fox " + TEXT), abs=1e-4)
    assert model.loglikelihood([]) == []


def test_bos_is_never_repeated_and_is_text_inside_a_text(harness: Any, net: Any, tokenizer: Tokenizer) -> None:
    model = adapter(harness, net, tokenizer)
    bos = tokenizer.token_to_id(BOS)
    assert model.tok_encode(BOS + "The quick") == model.tok_encode("The quick")
    assert model.tok_encode(f"The {BOS} quick").count(bos) == 1
    plain, with_bos = model.loglikelihood(requests([("The quick", " fox"), (BOS + "The quick", " fox")]))
    assert plain == with_bos
    first, again = model.loglikelihood(requests([("", "The"), (BOS, "The")]))
    assert first == again


def test_a_task_from_a_local_file(
    harness: Any, net: Any, tokenizer: Tokenizer, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models have the same accuracies on 200 items."""
    from lm_eval import simple_evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    task = write_task(tmp_path, "local_words", questions(TEXT, 200))
    found = harness.run_tasks(adapter(harness, net, tokenizer), [task], None)["local_words"]
    known = harness.known_tasks()
    expected = simple_evaluate(theirs, tasks=[task], log_samples=False, task_manager=known)["results"]["local_words"]
    assert found["acc,none"] == expected["acc,none"]
    assert found["acc_norm,none"] == expected["acc_norm,none"]
    assert 0 < found["acc,none"] < 1


def test_an_unknown_task_and_missing_data_are_one_line(
    harness: Any, net: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from mythos.errors import UserError

    with pytest.raises(UserError, match="--tasks no_such_task: no task of lm-evaluation-harness"):
        harness.check_names(["no_such_task"])
    path = write_task(tmp_path, "gone", [])
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(UserError, match="FileNotFoundError.*check the task") as caught:
        harness.run_tasks(adapter(harness, net, tokenizer), [path], None)
    assert "\n" not in str(caught.value)
