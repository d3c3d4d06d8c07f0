"""transformers loads an export where this project cannot be imported, and computes what the project's model does."""

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from launch.cli import main
from mythos.checkpoint.initial import ExportedWeights
from mythos.checkpoint.plain import values_of
from mythos.data.format import BOS
from mythos.errors import UserError
from mythos.export import SpecialTokens, export, load_exported
from mythos.export import weights as weights_module
from mythos.export.hugging_face import code
from mythos.model import build_model
from mythos.model.depth import fixed
from tests.cluster import clean_environment, run
from tests.export.conftest import VOCABULARY, write_export
from tests.export.load_in_transformers import GENERATED, TEXTS
from tests.tiny import MODELS, SEQUENCE_LENGTH, tiny_config

DEEPER = 5


@pytest.fixture(scope="module")
def exports(tokenizer: Tokenizer, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of each tiny model."""
    root = tmp_path_factory.mktemp("exports")
    for name in MODELS:
        config = tiny_config(name, tiny_data, root / "run", model__vocabulary_size=VOCABULARY)
        write_export(config, tokenizer, root / name)
    return root


@pytest.fixture(scope="module")
def found(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What transformers computes, in one process without this project."""
    home = tmp_path_factory.mktemp("home")
    program = Path(__file__).with_name("load_in_transformers.py")
    environment = clean_environment() | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, program, home / "results", *(exports / name for name in MODELS)], 240, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(home / "results")


@torch.no_grad()
def logits(model: nn.Module, ids: list[int], depth: int | None) -> torch.Tensor:
    """Of one sequence by itself, from the noise of seed 0."""
    return model(torch.tensor([ids]), depth=None if depth is None else fixed(depth, 1, [0]))[0]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative to the size of the expected values."""
    return float((torch.cat(found) - torch.cat(expected)).norm() / torch.cat(expected).norm())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name: str, exports: Path, found: dict[str, dict[str, Any]]) -> None:
    theirs, model = found[name], load_exported(exports / name)
    trained, deeper = (None, None) if name == "dense" else (3, DEEPER)
    assert (theirs["tied"], theirs["saved"], theirs["training"]) == (True, True, False)
    for ids, own in zip(theirs["ids"], theirs["logits"], strict=True):
        torch.testing.assert_close(own, logits(model, ids, trained), rtol=0, atol=1e-5)
    longest = max(map(len, theirs["ids"]))
    expected = [logits(model, ids, deeper) for ids in theirs["ids"]]
    for row, (ids, own) in enumerate(zip(theirs["ids"], expected, strict=True)):
        torch.testing.assert_close(theirs["padded"][row, longest - len(ids) :], own, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs["padded_right"][row, : len(ids)], own, rtol=0, atol=1e-5)
    in_bf16 = [theirs["bf16"][row, longest - len(ids) :].float() for row, ids in enumerate(theirs["ids"])]
    model.product_type = torch.bfloat16
    own_in_bf16 = [logits(model, ids, deeper).float() for ids in theirs["ids"]]
    model.product_type = torch.float32
    assert distance(in_bf16, expected) < 3 * distance(own_in_bf16, expected) < 0.3
    if name != "dense":
        assert (logits(model, theirs["ids"][0], trained) - expected[0]).abs().max() > 1e-3, "depth has an effect"
    predicted = torch.cat([own[:-1] for own in expected])
    targets = torch.tensor([token for ids in theirs["ids"] for token in ids[1:]])
    torch.testing.assert_close(theirs["loss"], F.cross_entropy(predicted, targets), rtol=0, atol=1e-5)
    assert theirs["gradient"].isfinite().all()
    assert theirs["gradient"].any()


@pytest.mark.parametrize("name", MODELS)
def test_a_beam_search_with_a_cache_is_one_without(name: str, found: dict[str, dict[str, Any]]) -> None:
    with_cache, without = found[name]["beams"]
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_gives_the_same_tokens(name: str, exports: Path, found: dict[str, dict[str, Any]]) -> None:
    """From prompts of different length, padded on the left; transformers with a cache, this project without."""
    model = load_exported(exports / name)
    for ids, generated in zip(found[name]["ids"], found[name]["generated"], strict=True):
        own = list(ids)
        for _ in range(GENERATED):
            own.append(int(logits(model, own, None if name == "dense" else DEEPER)[-1].argmax()))
        assert generated.tolist() == own[len(ids) :]


def test_the_tokenizer_gives_one_bos_and_takes_no_special_token_out_of_text(
    found: dict[str, dict[str, Any]], tokenizer: Tokenizer
) -> None:
    theirs = found["looped"]
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    assert theirs["ids"] == [[0, *plain.encode(text).ids] for text in TEXTS]
    assert theirs["decoded"] == TEXTS
    assert theirs["special"] == (BOS, BOS, BOS, SEQUENCE_LENGTH)


def test_routers_halting_and_decay_stay_in_fp32(found: dict[str, dict[str, Any]]) -> None:
    kept = {name.removeprefix("model.loop.") for name in found["mythos"]["fp32_in_bf16"]}
    routers = {f"core.{n}.feed_forward.router.{kind}" for n in (0, 1) for kind in ("weight", "e_score_correction_bias")}
    injection = {"injection.log_decay", "injection.step_bias"}
    assert kept == routers | injection | {"halting.gate.weight", "halting.gate.bias"}
    assert found["dense"]["fp32_in_bf16"] == []
    newer = {name.removeprefix("model.loop.") for name in found["newer"]["fp32_in_bf16"]}
    assert newer == routers | injection | {f"core.{n}.router_bias.weight" for n in (0, 1)}


def test_a_fresh_model_has_this_projects_initial_weights(
    found: dict[str, dict[str, Any]], tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("mythos", tiny_data, tmp_path / "run", model__vocabulary_size=VOCABULARY, seed=0)
    expected = values_of(build_model(config))
    theirs = {name.removeprefix("model."): value for name, value in found["mythos"]["fresh"].items()}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in theirs.items())


def test_the_code_needs_nothing_but_numpy_torch_and_transformers() -> None:
    files = code()
    direct: set[str] = set()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files
                direct |= {f"{node.module}.py"} if name == "modeling_mythos.py" else set()
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            outside = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
            assert outside <= {"numpy", "torch", "transformers"}, name
    assert direct == files.keys() - {"modeling_mythos.py"}, "of a local model, transformers copies only these"


def test_the_command_and_its_errors(
    trained: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--format", "hf", "--dtype", "bf16"]) == 0
    written = trained / "export" / "step_00000005_hf"
    assert str(written) in capsys.readouterr().out
    export(trained, tmp_path / "plain", dtype=torch.bfloat16)
    theirs, plain = load_exported(written).state_dict(), load_exported(tmp_path / "plain").state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in plain.items())
    parameters = ["embedding.weight", "loop.core.0.feed_forward.experts.w1", "loop.core.0.feed_forward.experts.w3"]
    both = [ExportedWeights(directory, parameters, []) for directory in (written, tmp_path / "plain")]
    assert both[0].shapes == both[1].shapes
    read = [torch.empty(both[0].shapes[parameters[1]]).flatten() for _ in both]
    for source, out in zip(both, read, strict=True):
        source.weights(parameters[1], 0, len(out), out)
    assert torch.equal(*read)
    with pytest.raises(UserError, match=r"--eos '<\|end\|>': the run's tokenizer has no such token"):
        export(trained, tmp_path / "out", for_transformers=SpecialTokens(eos="<|end|>"))
    assert not list(tmp_path.glob("*out*"))
    other = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(trained, tmp_path / "run")
    for path, old, new in (
        (other / "manifest.json", BOS, "<|begin|>"),
        (tmp_path / "run" / "config.yaml", str(tiny_data), str(other)),
    ):
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=r"--bos '<\|begin\|>': the run's tokenizer has no such token"):
        export(tmp_path / "run", tmp_path / "out", for_transformers=SpecialTokens())
    assert main(["export", str(trained), "--eos", "x"]) == 2
    assert "--eos: has an effect with --format hf only" in capsys.readouterr().err


def test_a_checkpoint_that_is_removed_meanwhile_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    opened = weights_module.checked_reader

    def removed_after_the_check(checkpoint: Path) -> Any:
        reader = opened(checkpoint)
        shutil.rmtree(checkpoint)
        return reader

    monkeypatch.setattr(weights_module, "checked_reader", removed_after_the_check)
    with pytest.raises(UserError, match="step_00000005: was removed while it was exported"):
        export(tmp_path / "run", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
