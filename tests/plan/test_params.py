"""Parameter counts: published numbers to the digit, and the arithmetic against the modules themselves."""

import re
from pathlib import Path

import pytest
import torch

from launch.cli import main
from mythos.config.load import load_model
from mythos.config.model_schema import Looped
from mythos.errors import UserError
from mythos.model import build_structure
from mythos.model.parameters import Role, parameter_roles, stacked_matrices
from mythos.plan.params import count_parameters
from mythos.plan.tensors import Treatment, parameters
from tests.tiny import MODELS, tiny_config

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
PUBLISHED = {
    "looped-140m": 144_323_136,
    "looped-370m": 388_003_328,
    "looped-770m": 776_655_680,
    "looped-1.3b": 1_338_591_744,
    "transformer-140m": 143_141_184,
    "transformer-370m": 385_903_104,
    "transformer-770m": 773_375_040,
    "transformer-1.3b": 1_333_868_544,
}
LADDER = {  # size, width, experts, mean loops
    "mythos-1b": (1e9, 2048, 64, 16),
    "mythos-3b": (3e9, 3072, 64, 16),
    "mythos-10b": (10e9, 4096, 128, 24),
    "mythos-50b": (50e9, 6144, 256, 32),
    "mythos-100b": (100e9, 8192, 256, 32),
    "mythos-500b": (500e9, 12288, 512, 48),
    "mythos-1t": (1e12, 16384, 512, 64),
}


def on_meta(name: str) -> torch.nn.Module:
    config = tiny_config("looped-moe", Path("data"), Path("run"))
    from dataclasses import replace

    model = load_model([CONFIGS / f"{name}.yaml"])
    with torch.device("meta"):
        return build_structure(replace(config, model=model))


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name: str) -> None:
    assert size(on_meta(name)) == PUBLISHED[name]


def test_the_parts_of_looped_770m_are_those_published() -> None:
    parts = count_parameters(load_model([CONFIGS / "looped-770m.yaml"])).parts
    assert parts["token table"] == 41_943_040
    assert parts["value tables"] == 377_487_360
    assert parts["attention"] + parts["feed-forward"] == 353_894_400
    assert parts["norms"] == 48_640
    assert parts["value gates"] == 2_880
    assert parts["injection"] == 1_640_960
    assert parts["readout C"] == 1_638_400


def test_the_flagship_is_as_large_as_looped_770m() -> None:
    assert size(on_meta("looped-moe-770m")) == pytest.approx(PUBLISHED["looped-770m"], rel=0.01)


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_has_the_sizes_in_its_names(name: str) -> None:
    target, width, experts, loops = LADDER[name]
    model = load_model([CONFIGS / f"{name}.yaml"])
    assert isinstance(model, Looped)
    assert model.core_experts is not None
    assert (model.width, model.core_experts.experts, model.adapter_loops) == (width, experts, loops)
    assert model.attention.kind == "mla"
    assert model.halting is not None
    assert size(on_meta(name)) == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_arithmetic_counts_what_the_modules_have(name: str) -> None:
    count = count_parameters(load_model([CONFIGS / f"{name}.yaml"]))
    module = on_meta(name)
    assert count.total == size(module)
    experts = [layer for layer in module.modules() if type(layer).__name__ == "Experts"]
    routed = sum(size(layer) for layer in experts)
    assert count.parts.get("routed experts", 0) == routed
    if experts:
        model = load_model([CONFIGS / f"{name}.yaml"])
        chosen = model.core_experts.experts_per_token / model.core_experts.experts
        assert count.total - count.active == pytest.approx(routed * (1 - chosen))


def test_the_command_prints_the_parts_and_their_sums(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", str(CONFIGS / "looped-moe-770m.yaml")]) == 0
    lines = dict(re.match(r"(.+?) {2,}([\d,]+)", line).groups() for line in capsys.readouterr().out.splitlines())
    numbers = {name: int(text.replace(",", "")) for name, text in lines.items()}
    sums = {name: numbers.pop(name) for name in ("total", "active per token", "of which lookup tables")}
    assert sum(numbers.values()) == sums["total"]
    idle = 58 / 64 * numbers["routed experts"]
    assert sums["active per token"] == sums["total"] - idle


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("injection", ["lti", "linear", "additive"])
def test_every_parameter_has_the_name_shape_and_treatment_that_the_model_gives_it(kind: str, injection: str) -> None:
    overrides = {} if kind == "dense" else {"model__injection": injection}
    config = tiny_config(kind, Path("data"), Path("run"), **overrides)
    model = build_structure(config)
    found = parameters(config.model)
    assert {parameter.name: parameter.shape for parameter in found} == {n: p.shape for n, p in model.named_parameters()}
    assert [parameter.name for parameter in found] == [name for name, _ in model.named_parameters()], "in this order"
    stacked, roles = stacked_matrices(model), parameter_roles(model)
    for parameter in found:
        tensor = model.get_parameter(parameter.name)
        assert parameter.stacked == stacked.get(tensor, 1)
        assert parameter.treatment is treatment(roles[tensor], tensor)


def treatment(role: Role, tensor: torch.Tensor) -> Treatment:
    if tensor.ndim > 1 and role in (Role.BLOCK, Role.OTHER):
        return Treatment.MATRIX if role is Role.BLOCK else Treatment.OUTER_MATRIX
    return {Role.EXPERT: Treatment.EXPERT, Role.ROUTER: Treatment.ROUTER}.get(role, Treatment.OTHER)


def test_rows_beyond_the_tokenizer_are_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "looped-770m.yaml")
    whole = count_parameters(load_model([file]))
    padded = count_parameters(load_model([file], ["model.tokenizer_size=32000"]))
    tables = 1 + 9  # of the tokens, and of nine layers, all 1,280 wide
    assert padded.parts["padding of tables"] == 768 * 1280 * tables
    assert padded.parts["token table"] == 32000 * 1280
    assert (padded.total, padded.tables) == (whole.total, whole.tables)
    assert "padding of tables" not in whole.parts
    with pytest.raises(UserError, match=r"model.tokenizer_size = 32768: must be below model.vocabulary_size \(32768\)"):
        load_model([file], ["model.tokenizer_size=32768"])
    assert main(["params", file, "model.tokenizer_size=32000"]) == 0
    assert re.search(r"padding of tables +9,830,400 ", capsys.readouterr().out)
