"""`mythos inspect`: its numbers are computed again, one token and one loop step at a time."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from launch.commands import invoke
from mythos.checkpoint.layout import find
from mythos.checkpoint.plain import load_plain_model
from mythos.config.model_schema import GroupedQuery, Latent
from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.errors import UserError
from mythos.eval.batches import validation_rows
from mythos.inspect.observe import StateTrace, depths_to_measure
from mythos.inspect.report import _verdict
from mythos.model import Model, build_model, depth, new_cache
from mythos.model.loop import LoopInputs, LoopState
from mythos.run.directory import RunDirectory
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, run_training

ROWS, STEPS, MOST = 5, 4, 12  # as many rows as the validations of tiny_config


@pytest.fixture(scope="module", params=["mythos", "looped", "dense"])
def config(
    request: pytest.FixtureRequest, one_rank: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """Of a run that has been inspected."""
    options = {"train__steps": STEPS} | ({} if request.param == "dense" else {"eval__depths": [1, 3, 12]})
    directory = tmp_path_factory.mktemp("inspected") / "run"
    config = tiny_config(request.param, tiny_data, directory, **options)
    assert one_rank.run(run_training, config) == [0]
    assert invoke(["inspect", str(directory), "--rows", str(ROWS)]) == 0
    return config


def figures(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (RunDirectory(Path(config.run.directory)).inspections / "figures.json").read_text(encoding="utf-8")
    )
    return found


def model_and_rows(config: Config) -> tuple[Model, np.ndarray, np.ndarray]:
    dataset = TokenDataset(Path(str(config.data.directory)), "validation")
    rows = validation_rows(dataset, ROWS)
    checkpoint = find(Path(config.run.directory), None)
    return load_plain_model(config, checkpoint), rows, dataset.read(rows)


def states(model: Any, row: np.ndarray, seed: int) -> tuple[list[LoopState], list[Tensor]]:
    """The loop's states of one row, step by step, and the logits of each layer's router: all layers at each step."""
    logits: list[Tensor] = []
    tokens_1S = torch.from_numpy(row[None, :-1])
    hooks = [
        block.feed_forward.router.register_forward_hook(lambda _, __, output: logits.append(output))
        for block in model.loop.core
        if block.expert_config is not None
    ]
    rotary = model.prelude[0].attention.rotary(tokens_1S.shape[1], torch.device("cpu"))
    x, values = model.embedding(tokens_1S), model.value_embeddings(tokens_1S)
    first, end = len(model.prelude), len(model.prelude) + len(model.loop.core)
    for each, value in zip(model.prelude, values[:first], strict=True):
        x = each(x, rotary, value)
    e = model.prelude_norm(x)
    found = [model.loop._initial_state(e, depth.fixed(MOST, 1, [seed]))]
    for step in range(1, MOST + 1):
        found.append(model.loop.step(found[-1], LoopInputs(e, values[first:end], rotary), step == MOST, False))
    for hook in hooks:
        hook.remove()
    return found, logits


def test_the_losses_are_those_of_a_validation(config: Config) -> None:
    found = figures(config)
    if config.loop is None:
        assert found["loss"] == pytest.approx(curve(config, "val/loss")[-1:], rel=1e-6)
        return
    assert found["depths"] == list(depths_to_measure(3, MOST)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    for steps in (1, 3, 12):
        expected = curve(config, f"val/loss_depth_{steps}")[-1]
        assert found["loss"][found["depths"].index(steps)] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_state_routing_and_halting_equal_those_computed_row_by_row(config: Config) -> None:
    found = figures(config)
    if config.loop is None:
        assert "state" not in found
        return
    model, numbers, rows = model_and_rows(config)
    layers = len(model.loop.core)
    norms, changes, distances, halted, ponder, losses = [], [], [], [], [], []
    chosen: list[list[Any]] = [[] for _ in range(layers)]
    entropies: list[list[Any]] = [[] for _ in range(layers)]
    for number, row in zip(numbers.tolist(), rows, strict=True):
        of_row, logits = states(model, row, number)
        h = [state.h_BSD[0].double() for state in of_row]
        norms.append([float((each**2).sum(-1).mean()) for each in h])
        changes.append([float(((after - before) ** 2).sum(-1).mean()) for before, after in pairwise(h)])
        distances.append([float(((each - h[-1]) ** 2).sum(-1).mean()) for each in h])
        for layer in range(layers if logits else 0):
            bias, of_layer = model.loop.core[layer].feed_forward.router.e_score_correction_bias, logits[layer::layers]
            chosen[layer].append([choose(each, bias, config) for each in of_layer])
            entropies[layer].append([entropy(each) for each in of_layer])
        if model.loop.halting is not None:
            halted += halting_steps(model, of_row, MOST)[0]
            ponder += halting_steps(model, of_row, config.loop.mean_depth)[1]
            trained = depth.fixed(round(config.loop.mean_depth), 1, [number])
            logits_1SV = model(torch.from_numpy(row[None, :-1]), None, trained)
            losses += F.cross_entropy(logits_1SV[0], torch.from_numpy(row[1:]), reduction="none").tolist()
    norm, change = np.sqrt(np.mean(norms, axis=0)), np.sqrt(np.mean(changes, axis=0))
    assert found["state"]["norm"] == pytest.approx(norm.tolist(), rel=1e-5)
    assert found["state"]["change"] == pytest.approx((change / norm[1:]).tolist(), rel=1e-4)
    distance = np.sqrt(np.mean(distances, axis=0)) / norm[-1]
    assert found["state"]["distance"] == pytest.approx(distance.tolist(), rel=1e-4, abs=1e-6)
    for layer in range(layers if chosen[0] else 0):
        check_routing(found["routing"], layer, np.concatenate(chosen[layer], axis=1))
        mean_entropy = np.mean(entropies[layer], axis=0)
        assert found["routing"]["entropy_LT"][layer] == pytest.approx(mean_entropy.tolist(), rel=1e-5)
    if halted:
        counts = {str(step): halted.count(step) for step in sorted(set(halted))}
        assert found["halting"]["tokens_by_step"] == counts
        assert found["halting"]["mean_ponder"] == pytest.approx(np.mean(ponder), rel=1e-5)
        check_ponder_groups(found["halting"]["ponder_groups"], ponder, losses)


def choose(logits_SE: Tensor, bias_E: Tensor, config: Config) -> list[set[int]]:
    """The experts of each token: the best two of the best group of two (options of the tiny model)."""
    assert config.model.kind == "looped"
    assert config.model.core_experts is not None
    assert (config.model.core_experts.groups, config.model.core_experts.experts) == (2, 4)
    scores = torch.sigmoid(logits_SE.double()) + bias_E.double()
    return [{0, 1} if each[0] + each[1] > each[2] + each[3] else {2, 3} for each in scores.tolist()]


def entropy(logits_SE: Tensor) -> float:
    """Of the normalised scores, the mean over the tokens."""
    scores = torch.sigmoid(logits_SE.double()).tolist()
    return float(np.mean([-sum(one / sum(each) * math.log(one / sum(each)) for one in each) for each in scores]))


def check_routing(routing: dict[str, Any], layer: int, chosen_TN: np.ndarray) -> None:
    steps, tokens = chosen_TN.shape
    load = [[sum(e in each for each in of_step) / (2 * tokens) for e in range(4)] for of_step in chosen_TN]
    np.testing.assert_allclose(routing["load_LTE"][layer], load, atol=1e-6)
    for one, other in ((0, 0), (0, 1), (2, 7), (steps - 1, 0)):
        common = np.mean([len(a & b) / 2 for a, b in zip(chosen_TN[one], chosen_TN[other], strict=True)])
        assert routing["overlap_LTT"][layer][one][other] == pytest.approx(common, abs=1e-6)


def halting_steps(model: Any, of_row: list[LoopState], most: int) -> tuple[list[int], list[float]]:
    """For each token the step at which the sum of p reaches the threshold, at the latest ``most``, and its ponder cost:
    these steps and what was left of 1 before the last one."""
    gate, found, costs = model.loop.halting.gate, [], []
    p_TS = np.stack([torch.sigmoid(F.linear(each.h_BSD, gate.weight, gate.bias))[0, :, 0] for each in of_row[1:]])
    for p_T in p_TS.T.tolist():
        spent, step = 0.0, 1
        while step < most and spent + p_T[step - 1] < model.loop.halting.threshold:
            spent += p_T[step - 1]
            step += 1
        found.append(step)
        costs.append(step + 1 - spent)
    return found, costs


def check_ponder_groups(found: dict[str, list[float]], ponder: list[float], losses: list[float]) -> None:
    """Tenths: the tokens in the order of their cost, dealt out one after the other."""
    by_cost = [loss for _, loss in sorted(zip(ponder, losses, strict=True))]
    tokens = len(by_cost)
    assert tokens % 10 != 0
    groups = [[by_cost[n] for n in range(tokens) if n * 10 // (tokens - 1) in {g, g + g // 9}] for g in range(10)]
    assert found["tokens"] == [len(each) for each in groups]
    assert found["loss"] == pytest.approx([np.mean(each) for each in groups], rel=1e-5)
    assert found["standard_error"] == pytest.approx([np.std(each) / math.sqrt(len(each)) for each in groups], rel=1e-4)
    costs = sorted(ponder)
    assert found["ponder"][0] == pytest.approx(np.mean(costs[: len(groups[0])]), rel=1e-5)


@torch.no_grad()
def test_gains_and_the_injection_are_those_of_the_model(config: Config) -> None:
    found = figures(config)
    if config.loop is None:
        return
    model, numbers, rows = model_and_rows(config)
    injection = model.loop.injection
    decay = torch.exp(-F.softplus(injection.step_bias.double()) * injection.log_decay.double().exp())
    assert found["decay"] == pytest.approx(decay.tolist(), rel=1e-5)
    assert found["spectral_radius"] == pytest.approx(max(decay.tolist()), rel=1e-5)

    losses = {}
    for steps in (1, 2):
        logits = model(torch.from_numpy(rows[:, :-1]), None, depth.fixed(steps, ROWS, numbers.tolist()))
        losses[steps] = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(rows[:, 1:]), reduction="none").numpy()
    gain = losses[1] - losses[2]
    assert found["gain_by_position"]["groups"] == ["0-2", "3-5", "6-8", "9-11", "12-14"]
    by_position = [gain[:, first : first + 3].mean() for first in range(0, 15, 3)]
    assert found["gain_by_position"]["gain"][0] == pytest.approx(by_position, abs=1e-5)

    dataset = TokenDataset(Path(str(config.data.directory)), "validation")
    text = [int(token) for number in range(len(dataset)) for token in dataset[number][1:]]
    by_count = sorted(set(text), key=lambda token: (-text.count(token), token))
    group, before = {}, 0
    for token in by_count:
        group[token] = 5 * before // len(text)
        before += text.count(token)
    of_group: list[list[float]] = [[] for _ in range(5)]
    for target, one in zip(rows[:, 1:].ravel().tolist(), gain.ravel().tolist(), strict=True):
        of_group[group[target]].append(one)
    expected = [np.mean(each) if each else math.nan for each in of_group]
    assert found["gain_by_frequency"]["gain"][0] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_the_report_shows_every_picture_also_in_tensorboard(config: Config) -> None:
    directory = RunDirectory(Path(config.run.directory))
    text = (directory.inspections / "report.md").read_text(encoding="utf-8")
    experts = getattr(config.model, "core_experts", None)
    wanted = {"cache"} | ({"depth", "state"} if config.loop else set()) | ({"experts", "halting"} if experts else set())
    files = {path.stem for path in directory.inspections.glob("*.png")}
    assert files == wanted
    assert all(f"]({name}.png)" in text for name in wanted)
    assert f"{figures(config)['loss'][0 if not config.loop else 2]:.4f}" in text
    events = EventAccumulator(str(directory.inspections))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"inspect/{name}" for name in wanted}
    for path in directory.inspections.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_other_attentions_is_counted_on_models_with_them(config: Config) -> None:
    """Parameters of models that are built, and the bytes of caches that are allocated."""
    found = {each["name"]: each for each in figures(config)["cost"]}
    own = config.model.attention
    heads, size = own.heads, own.head_size if isinstance(own, GroupedQuery) else own.value_head_size
    latent = {"query_latent_size": 32, "key_value_latent_size": 4 * size, "rotary_head_size": 2 * (size // 4)}
    wanted: dict[str, Any] = {
        "multi-head": GroupedQuery(kind="gqa", heads=heads, kv_heads=heads, head_size=size),
        "latent, 4 heads wide": Latent(kind="mla", heads=heads, content_head_size=size, value_head_size=size, **latent),
    }
    assert {name for name in found if name.startswith("this model: ")} == {next(iter(found))}
    depth = None if config.loop is None else 3
    for name, attention in {next(iter(found)): own, **wanted}.items():
        model = build_model(replace(config, model=replace(config.model, attention=attention)))
        assert found[name]["parameters"] == sum(each.numel() for each in model.parameters())
        entries = new_cache(model, [64], 64, depth, torch.device("cpu")).entries
        assert found[name]["cache_bytes"] == entries.numel() * 2 / 64
        text = (RunDirectory(Path(config.run.directory)).inspections / "report.md").read_text(encoding="utf-8")
        assert f"| {name} | {found[name]['parameters']:,} | " in text


def test_the_verdict_on_the_state_looks_at_its_last_steps() -> None:
    falling, level = 0.5 ** np.arange(1, 17), np.full(12, 0.01)
    for change, expected in (
        (falling, "approaches a fixed point"),
        (np.full(16, 1e-7), "approaches a fixed point"),
        (np.concatenate([falling[:4], level]), "near a fixed point, but its changes no longer fall"),
        (np.full(16, 0.3), "does not settle"),
    ):
        assert expected in _verdict(StateTrace(np.ones(17), change, np.ones(17)), 4)


def test_mistakes_are_one_line(config: Config) -> None:
    directory = config.run.directory
    with pytest.raises(UserError, match="step 99"):
        invoke(["inspect", directory, "--step", "99"])
    problem = "below the mean depth of training: give at least 3" if config.loop else "this model has no loop"
    with pytest.raises(UserError, match=f"--most-depth 2: {problem}"):
        invoke(["inspect", directory, "--most-depth", "2"])
