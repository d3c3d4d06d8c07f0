"""The option ``deterministic``: strict, and without filling every new tensor."""

from collections.abc import Iterator

import pytest
import torch

from mythos.ranks.determinism import compute_deterministically


@pytest.fixture
def restored() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("restored")
def test_determinism_is_strict_and_fills_no_memory() -> None:
    environ: dict[str, str] = {}
    compute_deterministically(environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


@pytest.mark.usefixtures("restored")
def test_a_workspace_that_the_user_has_set_is_kept() -> None:
    environ = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    compute_deterministically(environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
