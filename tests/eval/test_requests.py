"""Scores equal those of one forward pass for each request, without padding, on any number of ranks."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mythos.eval.requests import Request, Score, in_parts, padded_length, score, windows
from mythos.model import build_model, depth
from tests.model.helpers import randomise
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config

LONGEST = 40
CPU = torch.device("cpu")


def requests() -> list[Request]:
    """Of all lengths, some of which are padded to the same one."""
    generator = np.random.default_rng(0)
    lengths = [2, 2, 5, 17, 18, 18, 33, 40, 41, 41, 3]
    return [
        Request(generator.integers(VOCABULARY, size=length).astype(np.int32), 1 + number % (length - 1), number)
        for number, length in enumerate(lengths)
    ]


def model(kind: str) -> torch.nn.Module:
    """``mythos`` begins with a state of zero, because noise depends on the length of the input; ``noise`` does not."""
    options = {"mythos": {"model__initial_state": "zero"}}.get(kind, {})
    config = tiny_config("mythos" if kind == "noise" else kind, "data", "run", **options)
    return randomise(build_model(config), deviation=0.1).eval()


def scores(kind: str, micro_batch_tokens: int) -> list[Score]:
    with torch.no_grad():
        return score(model(kind), requests(), None if kind == "dense" else 2, micro_batch_tokens, LONGEST, CPU)


def one_by_one(kind: str) -> list[Score]:
    net, found = model(kind), []
    for request in requests():
        tokens = torch.from_numpy(request.tokens).long()
        plan = None if kind == "dense" else depth.fixed(2, 1, [request.state_seed])
        with torch.no_grad():
            logits = net(tokens[None, :-1], None, plan)[0].double().log_softmax(-1)
        chosen = [logits[place - 1, tokens[place]].item() for place in range(request.first, len(tokens))]
        best = [logits[place - 1].argmax().item() for place in range(request.first, len(tokens))]
        found.append(Score(np.array(chosen), best == tokens[request.first :].tolist()))
    return found


def assert_close(found: Sequence[Score], expected: Sequence[Score]) -> None:
    assert [each.is_greedy for each in found] == [each.is_greedy for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", ["mythos", "dense", "noise"])
def test_they_equal_one_forward_pass_for_each_request_on_any_ranks_and_in_any_batches(
    kind: str, one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    expected = scores("noise", 1) if kind == "noise" else one_by_one(kind)
    for pool, micro_batch_tokens in ((one_rank, 1), (one_rank, 7 * LONGEST), (two_ranks, 80), (four_ranks, 200)):
        for found in pool.run(scores, kind, micro_batch_tokens):
            assert_close(found, expected)


def test_without_ranks_and_without_requests() -> None:
    assert_close(scores("dense", 64), one_by_one("dense"))
    assert score(model("dense"), [], None, 64, LONGEST, CPU) == []


def test_a_long_text_is_scored_in_windows_with_as_much_context_as_fits() -> None:
    """The example in lm-evaluation-harness, where -1 is the BOS and a window has four tokens."""
    found = windows([-1, *range(10)], 1, 4)
    assert [(each.tokens[:-1].tolist(), each.tokens[each.first :].tolist()) for each in found] == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


def test_a_long_context_is_cut_on_the_left_and_nothing_gives_no_window() -> None:
    (found,) = windows(range(10), 8, 4)
    assert (found.tokens.tolist(), found.first) == ([5, 6, 7, 8, 9], 3)
    assert windows([5], 1, 4) == []


def test_padding_wastes_little_and_has_few_lengths() -> None:
    lengths = [padded_length(tokens, 2048) for tokens in range(1, 2049)]
    assert all(0 <= length - tokens < max(16, tokens / 4) for tokens, length in enumerate(lengths, start=1))
    assert len(set(lengths)) == 24
    assert padded_length(15, 15) == 15


def test_parts_hold_all_requests_in_order() -> None:
    parts = list(in_parts(requests(), 40))
    assert [each.state_seed for part in parts for each in part] == list(range(11))
    assert len(parts) > 3
