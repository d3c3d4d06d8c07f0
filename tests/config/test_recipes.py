"""The files of configs/recipe: what they resolve to beside the published values, and which models they fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mythos.config.load import flatten, load, load_model, to_dict
from mythos.errors import UserError
from tests.cluster import REPO

CONFIGS = REPO / "configs"
MODELS, RECIPES = (
    {path.stem: path for path in sorted((CONFIGS / kind).glob("*.yaml"))} for kind in ("model", "recipe")
)
RUN = CONFIGS / "run" / "pretrain.yaml"
SIZES = ("140m", "370m", "770m", "1.3b")
OF_THE_PAPER: dict[str, Any] = {
    "seed": 42,
    "model.attention.rope_base": 50_000.0,
    "model.attention.qk_norm": True,
    "model.attention.value_embeddings": True,
    "model.norm_epsilon": 1e-5,
    "model.injection": "lti",
    "model.initial_state": "noise",
    "init.head_norm": "ones",
    "loop.mean_depth": 8.0,
    "loop.depth": "poisson_per_sequence",
    "loop.stratified": False,
    "loop.curriculum_steps": 0,
    "loop.backprop_depth": 4,
    "train.global_batch_tokens": 524_288,
    "data.sequence_length": 2048,
    "optim.kind": "muon",
    "optim.learning_rate": 6e-3,
    "optim.beta1": 0.8,
    "optim.beta2": 0.95,
    "optim.epsilon": 1e-10,
    "optim.gradient_clip": 1.0,
    "optim.warmup_steps": 0,
    "optim.cooldown": "linear",
    "optim.cooldown_fraction": 0.5,
    "optim.final_learning_rate_fraction": 0.0,
    "optim.muon_learning_rate": 8e-3,
    "optim.muon_momentum": 0.95,
    "optim.muon_momentum_start": 0.85,
    "optim.muon_momentum_warmup_steps": 300,
    "optim.muon_weight_decay": 0.2,
    "optim.muon_beta2": 0.95,
}
OF_THE_CODE: dict[str, Any] = {
    "model.attention.qk_norm_epsilon": 2.0**-23,
    "model.feed_forward.relu2_factor": 0.5,
    "init.token_table": "orthogonal",
    "init.value_tables": "standard_normal",
    "init.value_gates": "uniform",
    "init.key_value": "each",
    "train.z_loss": 0.0,
    "optim.muon_decay_by_shape": True,
}
"""What the paper leaves open."""
PUBLISHED = OF_THE_PAPER | OF_THE_CODE
DIFFERENT: dict[str, dict[str, Any]] = {
    "parcae": {},
    "parcae-paper-start": {  # what the paper says of initial weights, taken for all of them
        "init.token_table": "normal",
        "init.value_tables": "normal",
        "init.value_gates": "orthogonal",
    },
    "mythos": {
        "model.attention.qk_norm_epsilon": 1e-6,  # the default; noise on the toy
        "init.token_table": "normal",
        "init.head_norm": "small",
        "loop.stratified": True,
    },
}
"""The differences of each recipe from the published one; the comments in the files give the reasons."""


def files(recipe: str, model: str) -> list[Path]:
    before = [RECIPES["parcae"]] if recipe == "parcae-paper-start" else []
    run = CONFIGS / "run" / f"{model}.yaml"
    return [MODELS[model], *before, RECIPES[recipe], run if run.exists() else RUN]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["looped", "transformer"])
def test_published_against_resolved_values(recipe: str, kind: str) -> None:
    """Prints the table, and fails on a difference that is not listed."""
    for size in SIZES:
        resolved = flatten(to_dict(load(files(recipe, f"{kind}-{size}"))))
        published = {path: value for path, value in PUBLISHED.items() if kind == "looped" or not of_a_loop(path)}
        if size in ("140m", "370m") and (CONFIGS / "run" / f"{kind}-{size}.yaml").exists():
            published["optim.learning_rate"] = 8e-3
        print(f"\n{recipe}, {kind}-{size}")
        for path, value in published.items():
            mark = "" if resolved[path] == value else "  <- another value"
            print(f"  {path:40} {value!s:>22} {resolved[path]!s:>22}{mark}")
        found = {path: resolved[path] for path, value in published.items() if not equal(resolved[path], value)}
        listed = {path: value for path, value in DIFFERENT[recipe].items() if path in published}
        assert found == listed
        missing = {path for path in PUBLISHED if path in resolved} - published.keys()
        assert not missing


def equal(found: Any, published: Any) -> bool:
    return found == (pytest.approx(published, rel=1e-6) if isinstance(published, float) else published)


def of_a_loop(path: str) -> bool:
    return path.startswith("loop.") or path in ("model.injection", "model.initial_state")


def test_every_recipe_has_a_list_of_its_differences() -> None:
    assert set(RECIPES) == set(DIFFERENT)
    for recipe, path in RECIPES.items():
        given = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert given.keys() - {"recipe"} <= PUBLISHED.keys(), recipe
        assert f"configs/recipe/{recipe}.yaml" in path.read_text(encoding="utf-8"), "it says how it is given"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_fits_every_model(recipe: str, model: str) -> None:
    """``load`` is what `mythos config` does, and raises an error for what has no effect."""
    config = load(files(recipe, model), [], 4)
    assert config.model == load_model(files(recipe, model)[:-1])


def test_what_the_model_does_not_have_is_left_out_of_a_recipe(tmp_path: Path) -> None:
    def resolved(model: str, text: str, *overrides: str) -> dict[str, Any]:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return flatten(to_dict(load([MODELS[model], tmp_path / "recipe.yaml", RUN], overrides)))

    recipe = "recipe: true\nloop: {stratified: false}\nmodel: {feed_forward: {relu2_factor: 0.5}}\n"
    assert resolved("transformer-140m", recipe)["loop"] is None
    assert resolved("looped-140m", recipe)["loop.stratified"] is False
    assert resolved("looped-140m", recipe)["model.feed_forward.relu2_factor"] == 0.5
    assert resolved("tiny-dense", recipe)["model.feed_forward.relu2_factor"] == 1.0, "it is swiglu"
    assert resolved("looped-140m", recipe, "loop.stratified=true")["loop.stratified"] is True
    with pytest.raises(UserError, match=re.escape("loop.depht = 1: unknown option; did you mean loop.depth?")):
        resolved("looped-140m", "recipe: true\nloop: {depht: 1}\n")
    with pytest.raises(UserError, match=r"loop.stratified = False: has no effect with loop.depth = 'fixed'"):
        resolved("looped-140m", "recipe: true\nloop: {depth: fixed, stratified: false}\n")
    with pytest.raises(UserError, match=r"loop = .*has no effect with model.kind = 'dense'"):
        resolved("transformer-140m", recipe.removeprefix("recipe: true\n"))


def test_a_recipe_comes_after_the_model() -> None:
    with pytest.raises(UserError, match=r"mythos.yaml: a recipe comes after the model: give a file of configs/model"):
        load([RECIPES["mythos"], MODELS["tiny-dense"], RUN])
