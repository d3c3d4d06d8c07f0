"""Exported weights equal the trained ones, bit for bit, from any layout, and load into the plain model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main
from mythos.checkpoint import layout
from mythos.checkpoint import restore as checkpoint
from mythos.checkpoint.manifest import weights_file
from mythos.checkpoint.plain import load_plain_model
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.export import INDEX_FILE, export, load_exported
from mythos.model import build_model
from mythos.run.directory import RunDirectory
from tests.cluster import clean_environment, run
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_some_steps


def logits_of_the_engine(config: Config, found: Path, tokens: torch.Tensor) -> torch.Tensor:
    """From the trained model itself, under DeepSpeed and with AutoEP's experts."""
    engine = TrainingEngine(config, torch.device("cpu"))
    checkpoint.load(engine, found)
    with engine.evaluation():
        return engine(tokens)


def plain_state(config: Config, found: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of the optimizer, under the names of the plain model."""
    engine = TrainingEngine(replace(config, parallel=replace(config.parallel, zero_stage=0)), torch.device("cpu"))
    checkpoint.load(engine, found)
    state = {name.replace(".router.gate.", ".router."): tensor for name, tensor in engine.module.state_dict().items()}
    for layer in [name.removesuffix("w1") for name in state if name.endswith(".experts.w1")]:
        gate, down, up = (state.pop(f"{layer}w{number}") for number in (1, 2, 3))
        state |= {f"{layer}gate_up_proj": torch.cat([gate, up], dim=1), f"{layer}down_proj": down}
    return {name: tensor.clone() for name, tensor in state.items() if "tokens_per_expert" not in name}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)


@pytest.mark.parametrize(
    ("model", "experts", "stage"),
    [
        ("looped-moe", 2, 3),
        ("mythos", 2, 1),
        ("looped-moe", 1, 0),
        ("newer", 2, 2),
        ("published", None, 3),
        ("dense", None, 2),
    ],
)
def test_logits_equal_those_of_the_trained_model(
    model: str,
    experts: int | None,
    stage: int,
    one_rank: RankPool,
    two_ranks: RankPool,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    options = {"parallel__expert_parallel_size": experts, "parallel__zero_stage": stage}
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, **options)
    two_ranks.run(run_some_steps, config, 3)
    found = export(tmp_path / "run", tmp_path / "out")
    loaded = load_exported(tmp_path / "out")
    tokens = torch.randint(96, (4, 15), generator=torch.Generator().manual_seed(0))
    alone = tiny_config(model, tiny_data, tmp_path / "other")
    trained = one_rank.run(logits_of_the_engine, alone, found, tokens)[0]
    if config.model.kind == "dense" or config.model.core_experts is None:
        assert torch.equal(logits(loaded, tokens), trained)
    else:  # AutoEP sums over experts in another order; the plain model with the same weights gives the same bits
        torch.testing.assert_close(logits(loaded, tokens), trained, rtol=1e-5, atol=1e-5)
        plain = build_model(config).eval()
        plain.load_state_dict(one_rank.run(plain_state, alone, found)[0])
        assert torch.equal(logits(loaded, tokens), logits(plain, tokens))
    assert torch.equal(logits(load_plain_model(config, found), tokens), logits(loaded, tokens))
    fresh = build_model(config).eval()
    assert not torch.equal(logits(fresh, tokens), trained), "training has changed the weights"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_data / "tokenizer.json").read_bytes()
    buffers = [name for name in loaded.state_dict() if name.endswith("e_score_correction_bias")]
    assert all(loaded.state_dict()[name].any() for name in buffers)


def test_a_checkpoint_of_another_model_is_refused(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    two_ranks.run(run_some_steps, tiny_config("dense", tiny_data, tmp_path / "run", ranks=2), 1)
    found = layout.find(tmp_path / "run", None)
    with pytest.raises(UserError, match=r"its blocks\.0\.attention.* is not of the configured model"):
        load_plain_model(tiny_config("looped", tiny_data, tmp_path / "other"), found)
    with pytest.raises(UserError, match="has no blocks.2"):
        load_plain_model(tiny_config("dense", tiny_data, tmp_path / "other", model__layers=3), found)


IN_PLAIN_PYTORCH = """
import sys
sys.modules["deepspeed"] = None  # importing it fails
from pathlib import Path
import torch
from mythos.export import load_exported
ids = torch.arange(10).view(2, 5)
for directory, depths, refused in ((sys.argv[1], (None, 3, 7), 0), (sys.argv[2], (None,), 3)):
    model = load_exported(Path(directory))
    with torch.no_grad():
        outputs = [model(ids) if depth is None else model(ids, depth=depth) for depth in depths]
    assert not model.training and all(logits.shape == (2, 5, model.config.vocabulary_size) for logits in outputs)
    if len(depths) > 1:
        mean, three, seven = outputs
        assert torch.equal(mean, three), (mean - three).abs().max()
        assert not torch.equal(mean, seven)
    losses = model.train()(ids[:, :-1], ids[:, 1:])
    losses.total.backward()
    assert torch.isfinite(losses.cross_entropy) and model.embedding.weight.grad is not None
    try:
        model(ids, depth=refused)
    except ValueError as error:
        print(error)
"""


def test_exported_models_are_called_alike_in_a_process_without_deepspeed(
    trained: Path, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    one_rank.run(run_some_steps, tiny_config("dense", tiny_data, tmp_path / "run"), 2)
    export(trained, tmp_path / "looped")
    export(tmp_path / "run", tmp_path / "dense")
    done = run(
        [sys.executable, "-c", IN_PLAIN_PYTORCH, tmp_path / "looped", tmp_path / "dense"], 60, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr
    refusals = ["depth 0: must be at least 1", "a dense model has no loop: leave out depth and exit_rule"]
    assert done.stdout.splitlines() == refusals


def test_many_files_hold_the_same_tensors_as_one(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "one")
    export(trained, tmp_path / "many", file_bytes=4000)
    index = json.loads((tmp_path / "many" / INDEX_FILE).read_text(encoding="utf-8"))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    whole = load_file(tmp_path / "one" / "model-00001-of-00001.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(tmp_path / "many" / file).items()}
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())

    export(trained, tmp_path / "half", dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "model-00001-of-00001.safetensors")
    in_fp32 = {name for name in whole if ".router." in name or name.endswith((".log_decay", ".step_bias"))}
    assert len(in_fp32) == 6, "weight and balance bias of two routers, and the injection"
    assert all(torch.equal(half[name], whole[name] if name in in_fp32 else whole[name].bfloat16()) for name in whole)
    assert {name for name, value in half.items() if value.dtype == torch.float32} == in_fp32


def test_the_command_and_its_errors(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), "--step", "2", "--output", str(tmp_path / "two")]) == 0
    assert "step_00000002" in capsys.readouterr().out
    assert main(["export", str(trained)]) == 0
    assert (trained / "export" / "step_00000005" / INDEX_FILE).exists()
    with pytest.raises(UserError, match=r"step 3: .* has checkpoints of steps 5, 4, 2"):
        export(trained, tmp_path / "three", step=3)
    with pytest.raises(UserError, match="exists: name another directory"):
        export(trained, tmp_path / "two")
    with pytest.raises(UserError, match="has no complete checkpoint"):
        export(tmp_path / "two", tmp_path / "four")
    weights = tmp_path / "two" / "model-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="not an exported model"):
        load_exported(tmp_path / "two")


def test_a_damaged_checkpoint_is_not_exported(trained: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    path = RunDirectory(tmp_path / "run").checkpoints / layout.tag(4) / weights_file(1)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match the hash in the manifest: name another step"):
        export(tmp_path / "run", tmp_path / "out", step=4)
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "run", tmp_path / "out", step=5).name == layout.tag(5)
