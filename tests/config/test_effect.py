"""An option without effect is an error, and no layer has to be edited to switch a feature off in a later one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mythos.config.load import load, load_run, to_dict
from mythos.config.optim_schema import COOLDOWN
from mythos.config.option import needs_of
from mythos.config.schema import Config
from mythos.config.tree import find, options
from mythos.errors import UserError
from tests.config.test_load import CONFIGS, MODEL, RUN

VERSION_0_1 = Path(__file__).parents[1] / "train" / "version_0_1"


def findings(model: str, *overrides: str) -> list[str]:
    """What is wrong with a shipped model with these options, on one process."""
    try:
        load([CONFIGS / "model" / f"{model}.yaml", RUN], overrides, 1)
    except UserError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("model", "override", "switch"),
    [
        ("tiny-looped", "model.adapter_loops=3", "model.adapter_rank=2"),
        ("tiny-looped", "loop.log_normal_sigma=0.7", "loop.depth=log_normal_poisson_per_sequence"),
        ("tiny-looped", "loop.stratified=false", None),
        ("tiny-looped", "train.max_rewinds=1", "train.spike_rewind=true"),
        ("tiny-looped", "train.collapse_steps=7", None),
        ("tiny-looped", "eval.exit_when_halted=true", "model.halting={}"),
        ("tiny-looped", "data.cache_gib=1.5", "data.cache_directory=/cache"),
        ("tiny-looped", "parallel.persistent_parameter_elements=0", "parallel.zero_stage=3"),
        ("tiny-dense", "eval.depths=[1]", None),
        ("tiny-dense", "eval.exit_change=0.1", None),
        ("tiny-dense", "loop.mean_depth=2", None),
        ("tiny-looped", "optim.cooldown_fraction=0.2", "optim.cooldown=cosine"),
        ("tiny-looped", "optim.final_learning_rate_fraction=0.1", "optim.cooldown=linear"),
        ("tiny-looped", "optim.muon_momentum_start=0.5", "optim.muon_momentum_warmup_steps=5"),
        ("tiny-looped", "sample.temperature=0.5", "sample.tokens=5"),
        ("tiny-looped", "train.spike_rewind=true", "train.spike_sigma=6.0"),
    ],
)
def test_an_option_without_effect_is_an_error(model: str, override: str, switch: str | None) -> None:
    off = [
        "loop.depth=poisson_per_batch" if "stratified" in override else "train.spike_sigma=null",
        *(["optim.cooldown=constant"] if "fraction" in override else []),
        *(["optim.kind=muon", "optim.muon_momentum_warmup_steps=0"] if "muon" in override else []),
        *(["sample.tokens=0"] if "sample" in override else []),
        *(["parallel.zero_stage=2"] if "persistent" in override else []),
    ]
    path = override.split("=")[0]
    needs = needs_of(find(path) or find(path.split(".")[0]))  # type: ignore[arg-type]
    if path == "loop.mean_depth":
        path, needs = "loop", needs_of(options()["loop"])
    if path == "optim.final_learning_rate_fraction":
        needs = COOLDOWN  # of optim.cooldown_fraction, which it needs and which is on by default
    assert needs is not None
    lines = [line for line in findings(model, *off, override) if line.startswith(f"{path} =")]
    assert len(lines) == 1
    assert f"has no effect with{'out' if not needs.values else ''} {needs.path}" in lines[0]
    assert f"{needs.path}" in lines[0].split(", or ")[1], "the remedy names the option that is needed"
    if switch is not None:
        assert not [line for line in findings(model, *off, override, switch) if line.startswith(path)]


def test_a_residual_scale_has_no_effect_when_the_core_is_run_once() -> None:
    once = ["loop.depth=fixed", "loop.mean_depth=1", "loop.backprop_depth=1"]
    for kind in ("loops", "root_loops"):
        assert findings("tiny-looped", f"model.residual_scaling={kind}", *once) == [
            f"model.residual_scaling = '{kind}': has no effect with loop.mean_depth = 1: leave it at 'none', or give a "
            "larger mean depth"
        ]
        assert not findings("tiny-looped", f"model.residual_scaling={kind}")
    assert "model.core_experts" in findings("tiny-looped", "model.core_experts.router_bias_per_loop=2")[0]


def test_an_end_of_the_cooldown_has_no_effect_without_a_cooldown() -> None:
    off = ["optim.cooldown_fraction=0", "optim.final_learning_rate_fraction=0.1"]
    assert findings("tiny-looped", *off) == [
        "optim.final_learning_rate_fraction = 0.1: has no effect without optim.cooldown_fraction: leave it at 0.0, or "
        "give optim.cooldown_fraction"
    ]


def test_every_need_is_an_option_with_these_values() -> None:
    for path, field in options().items():
        if needs := needs_of(field):
            assert find(needs.path), path
            assert needs.path != path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.muon_momentum=0.9", "optim.muon_momentum = 0.9: only optim.kind=muon has it: "),
        ("model.layers=4", "model.layers = 4: only model.kind=dense has it: "),
        (
            "model.attention.value_head_size=4",
            "model.attention.value_head_size = 4: only model.attention.kind=mla ",
        ),
    ],
)
def test_an_option_of_another_kind_is_named_with_that_kind(override: str, line: str) -> None:
    assert any(found.startswith(line) for found in findings("tiny-looped", override))


def test_a_later_layer_that_switches_something_off_takes_its_options_along(tmp_path: Path) -> None:
    lower = tmp_path / "lower.yaml"
    lower.write_text(
        "optim: {kind: muon, muon_learning_rate: 0.01, final_learning_rate_fraction: 0.1, beta1: 0.8}\n"
        "data: {cache_directory: /cache, cache_gib: 3}\nparallel: {persistent_parameter_elements: 7}\n",
        encoding="utf-8",
    )
    off = ["optim.kind=adamw", "optim.cooldown=constant", "data.cache_directory=null", "parallel.zero_stage=1"]
    config = load([MODEL, RUN, lower], [*off, "sample.tokens=0"], 2)
    assert config.optim.kind == "adamw"
    assert config.optim.beta1 == 0.8, "an option that both kinds have stays"
    assert config.optim.final_learning_rate_fraction == 0.0
    assert (config.data.cache_gib, config.sample.prompt) == (64.0, "")
    with pytest.raises(UserError, match="muon_momentum = 0.9: only optim.kind=muon has it"):
        load([MODEL, RUN, lower], [*off, "optim.muon_momentum=0.9"], 2)
    with pytest.raises(UserError, match="sample.prompt = 'x': has no effect without sample.tokens"):
        load([MODEL, RUN, lower], ["sample.tokens=0", "sample.prompt=x"], 2)


@pytest.mark.parametrize("name", ["dense-adamw", "published-muon"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_file_of_a_run_of_version_0_1_loads(name: str, world_size: int, tmp_path: Path) -> None:
    """It has the options of both kinds of optimizer."""
    file = VERSION_0_1 / name / "config.yaml"
    configs: list[Config] = [load_run(file, (), world_size), load([file], ["data.directory=elsewhere"], world_size)]
    for config in configs:
        tree: dict[str, Any] = to_dict(config)
        assert ("weight_decay" in tree["optim"]) == (config.optim.kind == "adamw")
        assert ("muon_momentum" in tree["optim"]) == (config.optim.kind == "muon")
    with pytest.raises(UserError, match="eval.exit_when_halted = True: has no effect without model.halting"):
        load_run(file, ["eval.exit_when_halted=true"], world_size)
    copied = Path(shutil.copy(file, tmp_path / "config.yaml"))
    with pytest.raises(UserError, match="has it: leave it out"):
        load([copied], [], world_size)
