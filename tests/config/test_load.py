import json
import re
from pathlib import Path

import pytest
import yaml

from mythos.config.load import load, load_model, load_run, to_dict
from mythos.config.show import documented_yaml
from mythos.config.tree import options
from mythos.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL, RUN = CONFIGS / "model" / "tiny-looped-moe.yaml", CONFIGS / "run" / "demo.yaml"


def refused(*overrides: str, ranks: int = 2) -> list[str]:
    """The lines of the error, without the first."""
    with pytest.raises(UserError) as error:
        load([MODEL, RUN], overrides, ranks)
    first, *lines = str(error.value).splitlines()
    assert first == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize("model", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("run", sorted((CONFIGS / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_model_loads_with_every_shipped_run(model: Path, run: Path) -> None:
    for processes in (1, 2):
        assert load([model, run], [], processes).parallel.expert_parallel_size is None


def test_later_layers_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("train: {steps: 7, max_bad_steps: 2}\n", encoding="utf-8")
    config = load([MODEL, RUN, layer], ["train.steps=9", "optim.learning_rate=2e-4", "eval.depths=[3]"], 2)
    assert (config.train.steps, config.train.max_bad_steps) == (9, 2)
    assert config.optim.learning_rate == 2e-4
    assert config.eval.depths == (3,)


def test_everything_wrong_is_reported_at_once() -> None:
    lines = refused(
        "train.stepz=3",
        "train.steps=abc",
        "seed=true",
        "optim.learning_rate=.nan",
        "precision=fp16",
        "loop.backprop_depth=1.5",
        "eval.depths=[0]",
        "model.attention.kv_heads=3",
        "parallel.expert_parallel_size=3",
        "train.global_batch_sequences=50",
    )
    expected = [
        "train.stepz = 3: unknown option; did you mean train.steps?",
        "train.steps = 'abc': input should be a valid integer",
        "seed = True: input should be a valid integer",
        "optim.learning_rate = nan: input should be a finite number",
        "precision = 'fp16': input should be 'auto', 'fp32' or 'bf16'",
        "loop.backprop_depth = 1.5: input should be a valid integer",
        "eval.depths = 0: input should be greater than 0",
        "model.attention.kv_heads = 3: must divide heads (4)",
        "parallel.expert_parallel_size = 3: must divide the number of processes (2)",
        "parallel.expert_parallel_size = 3: must divide model.core_experts.experts (8)",
        "train.global_batch_sequences = 50: must be a multiple of train.micro_batch_sequences (16) x processes (2) "
        "= 32 sequences: nearest is 32 or 64",
    ]
    assert sorted(lines) == sorted(expected)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.attention.head_size=7"], "model.attention.head_size = 7: must be even, for rotary embedding"),
        (
            ["model.core_experts.experts=5", "parallel.expert_parallel_size=2"],
            "must divide model.core_experts.experts (5)",
        ),
        (["model.core_experts.experts_per_token=9"], "must be at most the experts a token may choose from (8)"),
        (["model.core_experts=null", "parallel.expert_parallel_size=2"], "has no effect without model.core_experts"),
        (["train.global_batch_tokens=8192"], "give it or train.global_batch_tokens, one of the two"),
        (["train.global_batch_sequences=null"], "give it or train.global_batch_tokens, one of the two"),
        (
            ["train.global_batch_sequences=null", "train.global_batch_tokens=1000"],
            "multiple of data.sequence_length (256)",
        ),
        (["train.global_batch_sequences=null", "train.global_batch_tokens=256"], "nearest is 8192"),
        (["loop=null"], "loop = None: a looped model needs it"),
        (["loop.depth=fixed", "loop.mean_depth=2.5"], "must be a whole number when loop.depth is fixed"),
        (["model.kind=deep"], "model.kind = 'deep': input should be 'looped' or 'dense'"),
        (["optim=null"], "optim = None: input should be an object"),
        (["train.steps=0"], "train.steps = 0: input should be greater than 0"),
        (["model.width=1e3"], "model.width = 1000.0: input should be a valid integer"),
    ],
)
def test_each_mistake_is_named_with_value_and_remedy(overrides: list[str], line: str) -> None:
    assert any(line in found for found in refused(*overrides)), refused(*overrides)


def test_a_wrong_option_gives_no_findings_that_only_follow_from_it() -> None:
    assert refused("train.micro_batch_sequences=0") == [
        "train.micro_batch_sequences = 0: input should be greater than 0"
    ]


def test_dense_models_take_no_loop() -> None:
    files = [CONFIGS / "model" / "tiny-dense.yaml", RUN]
    with pytest.raises(UserError, match="loop = 'given': has no effect with model.kind = 'dense'") as error:
        load(files, ["parallel.expert_parallel_size=1", "loop.recompute=true", "eval.depths=[1]"], 2)
    assert "parallel.expert_parallel_size = 1: has no effect without model.core_experts: leave it at null" in str(
        error.value
    )
    assert "eval.depths = [1]: has no effect with model.kind = 'dense'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "found duplicate key a"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "must hold options as `key: value`"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="bad.yaml") as error:
        load([file])
    assert message in str(error.value)


def test_a_missing_file_and_a_bad_override_are_named() -> None:
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        load(["nowhere.yaml"])
    with pytest.raises(UserError, match="'train.steps': an override has the form key=value"):
        load([MODEL, RUN], ["train.steps"], 2)
    with pytest.raises(UserError, match=r"'train.steps=\?\?\?': train.steps = '\?\?\?': give a value"):
        load([MODEL, RUN], ["train.steps=???"], 2)
    with pytest.raises(UserError, match=r"model = \[1\]: input should be an object"):
        load([MODEL, RUN], ["model=[1]"], 2)
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        load([MODEL, RUN], ["data.directory=${oc.env:NOT_SET_ANYWHERE}"], 2)


def test_every_option_is_documented_in_one_line() -> None:
    for path, field in options().items():
        assert field.description, path
        assert "\n" not in field.description, path


def test_every_option_has_a_reader() -> None:
    """Read as ``section.option`` somewhere in the code, the section by its name or by a local name for it."""
    local_names = {
        "core_experts": ("experts",),
        "NAME": ("source",),
    }
    received = ("config", "options")  # a part of the code that gets one section calls it so
    root = Path(__file__).parents[2]
    sources = [*root.glob("mythos/**/*.py"), *root.glob("launch/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.name not in ("schema.py", "show.py"))
    unread = []
    for path in options():
        *sections, name = path.split(".")
        section = sections[-1] if sections else "config"
        names = (section, *received, *local_names.get(section, ()))
        if not any(re.search(rf"\b_?{local}\.{name}\b", code) for local in names):
            unread.append(path)
    assert not unread


@pytest.mark.parametrize("model", ["tiny-looped-moe", "tiny-dense"])
def test_the_printed_configuration_loads_back(model: str, tmp_path: Path) -> None:
    config = load([CONFIGS / "model" / f"{model}.yaml", RUN], ["sample.prompt='a: \"b\" # c'"], 2)
    printed = documented_yaml(config)
    file = tmp_path / "printed.yaml"
    file.write_text(printed, encoding="utf-8")
    assert load([file], [], 2) == config
    assert json.loads(json.dumps(yaml.safe_load(printed))) == to_dict(config)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run directory, it has no config\.yaml: give the directory of a run"):
        load_run(tmp_path / "config.yaml")


def test_an_option_may_refer_to_one_of_another_layer(tmp_path: Path) -> None:
    files = ["configs/model/tiny-looped.yaml", "configs/run/demo.yaml"]
    assert load(files, ["run.directory=runs/s${seed}", "seed=3"]).run.directory == "runs/s3"
    with pytest.raises(UserError, match=r"run.directory = '\$\{nothing\}': Interpolation key 'nothing' not found: "):
        load(files, ["run.directory=${nothing}", "seed=3"])


def test_parameters_are_counted_whatever_the_number_of_processes() -> None:
    assert load_model(["configs/model/looped-moe-770m.yaml", "configs/run/pretrain.yaml"]).width == 1280
