"""The loss of the head, against PyTorch with all logits in memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mythos.loss import CHUNK_LOGITS, IGNORED, cross_entropy_and_z_loss


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_loss_in_chunks_equals_the_loss_at_once(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(2, 7, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    targets = torch.randint(10, (2, 7))
    targets[1, 3:] = IGNORED
    kept = targets.flatten() != IGNORED
    logits = (hidden @ head.T).flatten(0, 1)[kept]
    cross_entropy = F.cross_entropy(logits, targets.flatten()[kept])
    z = z_loss * logits.logsumexp(-1).square().mean()
    expected = torch.autograd.grad(cross_entropy + z, (hidden, head))
    for chunk_logits in (10**6, 30, 10, 1):
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", chunk_logits)
        loss = cross_entropy_and_z_loss(hidden, head, targets, z_loss)
        assert_close(torch.stack(loss), torch.stack((cross_entropy + z, cross_entropy, z)))
        for own, reference in zip(torch.autograd.grad(3 * loss.total, (hidden, head)), expected, strict=True):
            assert_close(own, 3 * reference)


def test_ignored_targets_count_for_nothing() -> None:
    hidden, head = torch.randn(2, 4, 8, requires_grad=True), torch.randn(10, 8)
    targets = torch.randint(10, (2, 4))
    expected = F.cross_entropy(hidden[:1].flatten(0, 1) @ head.T, targets[:1].flatten())
    targets[1] = IGNORED
    assert_close(cross_entropy_and_z_loss(hidden, head, targets).cross_entropy, expected)
    nothing = cross_entropy_and_z_loss(hidden, head, torch.full((2, 4), IGNORED), 0.1)
    assert [value.item() for value in nothing] == [0, 0, 0]
    assert torch.autograd.grad(nothing.total, hidden)[0].count_nonzero() == 0


def test_in_bf16_loss_and_gradients_are_those_of_fp32() -> None:
    """At a size where a sum in bf16 is off by more than a percent: 16,384 tokens, a vocabulary of 32,768."""
    torch.manual_seed(0)
    hidden = torch.randn(8, 2048, 32).bfloat16().requires_grad_()
    head = (0.5 * torch.randn(32_768, 32)).bfloat16().requires_grad_()
    targets = torch.randint(len(head), hidden.shape[:2])
    loss = cross_entropy_and_z_loss(hidden, head, targets)
    loss.total.backward()
    exact_hidden, exact_head = (tensor.detach().float().requires_grad_() for tensor in (hidden, head))
    exact = 0.0
    for rows, of_rows in zip(exact_hidden, targets, strict=True):
        part = F.cross_entropy(rows @ exact_head.T, of_rows) / len(targets)
        part.backward(inputs=(exact_hidden, exact_head))
        exact += part.item()
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact, rel=1e-4)
    for tensor, reference in ((head, exact_head), (hidden, exact_hidden)):
        error = (tensor.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 5e-3


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_logits_are_never_all_in_memory(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 1000)
    hidden, head = torch.randn(1, 200, 2, requires_grad=True), torch.randn(100, 2, requires_grad=True)
    with LargestTensor() as largest:
        cross_entropy_and_z_loss(hidden, head, torch.zeros(1, 200, dtype=torch.long), z_loss).total.backward()
    assert largest.elements == 1000
