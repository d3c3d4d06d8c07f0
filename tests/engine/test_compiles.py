"""When blocks are compiled, and the error where torch would find no compiler."""

import shutil
from typing import Any

import pytest
import torch

from mythos.engine.sections import compiles
from mythos.errors import UserError
from tests.tiny import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("found", [None, "/usr/bin/g++"])
def test_auto_compiles_on_gpus_where_it_can(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)

    def with_option(option: str) -> Any:
        return tiny_config("looped", "data", "run", compile=option)

    assert not compiles(with_option("auto"), CPU)
    assert compiles(with_option("auto"), GPU) == (found is not None)
    assert not compiles(with_option("off"), GPU)
    if found:
        assert compiles(with_option("blocks"), CPU)
    else:
        with pytest.raises(UserError, match="compile = blocks: .* no g\\+\\+"):
            compiles(with_option("blocks"), CPU)
