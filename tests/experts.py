"""Which form of AutoEP's layers an engine takes on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mythos.engine import experts


@contextmanager
def experts_as_on_a_gpu() -> Iterator[None]:
    """Engines that are built within it keep AutoEP's own form, which GPUs use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "use_cpu_form", lambda layer: None)
        yield
