"""The data of a run: which changes a resumed run accepts, and how bad input is reported on every rank."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from mythos.config.consent import check_names
from mythos.config.load import to_dict, validate
from mythos.config.schema import Config
from mythos.config.show import documented_yaml
from mythos.data.dataset import TokenDataset
from mythos.data.open import check_data_unchanged
from mythos.data.stream import Source, TokenStream
from mythos.errors import UserError
from mythos.ranks.preflight import open_data_everywhere
from mythos.run.metrics import read_metrics
from tests.data.conftest import open_run_data, write_data_set
from tests.data.test_dataset import flip_byte
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training


def failure(config: Config, accept: tuple[str, ...] = ()) -> tuple[str, bool]:
    """The error message of this rank, and whether it is marked as the same on all ranks."""
    try:
        run_training(config, accept)
    except UserError as error:
        return str(error), error.agreed
    return "no error", False


def mixed(config: Config, sources: dict[str, tuple[Path, float]]) -> Config:
    """The configuration with several sources instead of one data set."""
    tree = to_dict(config)
    tree["data"] |= {
        "directory": None,
        "sources": {name: {"directory": str(path), "weight": weight} for name, (path, weight) in sources.items()},
    }
    return validate(tree, 8 // config.train.micro_batch_sequences)


def test_a_mixture_trains_resumes_and_saves_its_position(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "other", VOCABULARY, seed=1, rows=31)
    sources = {"web": (tiny_data, 3.0), "code": (other, 1.0)}
    options = {"train__steps": 6, "checkpoint__every": 3, "eval__every": 3, "optim__cooldown": "constant"}
    straight = mixed(tiny_config("dense", tiny_data, tmp_path / "straight", ranks=2, **options), sources)
    assert two_ranks.run(run_training, straight) == [0, 0]
    state = json.loads(
        (tmp_path / "straight" / "checkpoints" / "step_00000006" / "state.json").read_text(encoding="utf-8")
    )
    assert state["samples"] == 48
    assert state["epochs"] == {"code": 12 / 31, "web": 36 / 103}
    assert set(state["data"]["sources"]) == {"code", "web"}
    assert state["data"]["sources"]["web"]["weight"] == 3
    last = next(line for line in reversed(read_metrics(tmp_path / "straight")) if "val/loss" in line)
    assert last["val/loss"] == pytest.approx((3 * last["val/web/loss"] + last["val/code/loss"]) / 4)
    errors = [last[f"val/{name}loss_standard_error"] for name in ("", "web/", "code/")]
    assert errors[0] == pytest.approx(math.hypot(3 * errors[1], errors[2]) / 4)

    moved = {"web": (Path(shutil.copytree(tiny_data, tmp_path / "moved")), 3.0), "code": (other, 1.0)}
    resumed = mixed(
        tiny_config("dense", tiny_data, tmp_path / "run", ranks=2, **(options | {"train__steps": 3})), sources
    )
    assert two_ranks.run(run_training, resumed) == [0, 0]
    resumed = mixed(tiny_config("dense", tiny_data, tmp_path / "run", ranks=2, **options), moved)
    assert two_ranks.run(run_training, resumed) == [0, 0]
    assert curve(resumed, "train/loss") == curve(straight, "train/loss")

    heavier = {"web": (tiny_data, 2.0), "code": (other, 1.0)}
    changed = mixed(
        tiny_config("dense", tiny_data, tmp_path / "run", ranks=2, **(options | {"train__steps": 7})), heavier
    )
    messages = two_ranks.run(failure, changed)
    assert messages[0] == messages[1]
    assert "data.sources.web.weight: 3.0 -> 2.0" in messages[0][0]
    assert "accept the changes: --accept data.sources.web.weight" in messages[0][0]
    assert two_ranks.run(run_training, changed, ("data.sources.web.weight",)) == [0, 0]
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert "data changed: sources.web.weight: 3.0 -> 2.0; resuming at sample 48" in log
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000007" / "state.json").read_text(encoding="utf-8"))
    assert state["data"]["sources"]["web"]["weight"] == 2


@pytest.mark.parametrize(
    ("change", "line", "options"),
    [
        ({"shuffle_shards": 5}, "shuffle_shards: 4 -> 5", ["data.shuffle_shards"]),
        ({"seed": 77}, "seed: 1 -> 77", ["seed"]),
        ({"global_batch_sequences": 77}, "global_batch_sequences: 8 -> 77", ["train.global_batch_sequences"]),
        (
            {"sources": {"a": {"fingerprint": "y", "weight": 1.0}}},
            "sources.a.fingerprint: 'x' -> 'y'",
            ["data.sources.a.directory"],
        ),
        (
            {"sources": {"a": {"fingerprint": "x", "weight": 2.0}}},
            "sources.a.weight: 1.0 -> 2.0",
            ["data.sources.a.weight"],
        ),
        (
            {"sources": {"data": {"fingerprint": "x", "weight": 1.0}}},
            "sources.a.fingerprint: 'x' -> absent",
            ["data.sources.a.directory", "data.sources.a.weight", "data.directory"],
        ),
    ],
)
def test_a_change_of_the_data_is_refused_with_the_options_that_accept_it(
    change: dict[str, Any], line: str, options: list[str]
) -> None:
    before = {
        "seed": 1,
        "global_batch_sequences": 8,
        "shuffle_shards": 4,
        "sources": {"a": {"fingerprint": "x", "weight": 1.0}},
    }
    now = before | change
    assert check_data_unchanged(before, dict(before), ()) == []
    with pytest.raises(UserError) as error:
        check_data_unchanged(before, now, ["optim"])
    assert line in str(error.value)
    assert str(error.value).endswith(" " + " ".join(f"--accept {option}" for option in options))
    check_names(options)
    assert line in check_data_unchanged(before, now, options)
    if "sources" in change:
        assert line in check_data_unchanged(before, now, ["data"]), "a section accepts all options in it"
        with pytest.raises(UserError):
            check_data_unchanged(before, now, ["data.sources.b"])


def test_a_batch_in_tokens_is_accepted_under_its_own_name() -> None:
    assert check_data_unchanged(
        {"global_batch_sequences": 8}, {"global_batch_sequences": 4}, ["train.global_batch_tokens"]
    )


def damage_late_shard(data: Path, config: Config) -> tuple[Path, int]:
    """Flip a byte in the shard that a run of one shard at a time needs last; returns it and its first step."""
    dataset = TokenDataset(data, "train")
    ends = np.cumsum([shard.rows for shard in dataset.shards])
    stream = TokenStream([Source("data", 1.0, dataset)], config.seed, config.data.shuffle_shards)
    _, rows = stream.samples(0, len(dataset))
    shards = np.searchsorted(ends, rows, side="right")
    first_use = [int(np.argmax(shards == number)) for number in range(len(ends))]
    last = int(np.argmax(first_use))
    shard = data / "train" / dataset.shards[last].raw.name
    flip_byte(shard, -1)
    return shard, first_use[last] // 8 + 1


def test_a_damaged_shard_ends_all_ranks_during_the_run_and_loses_no_step(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    options = {"train__steps": 12, "data__shuffle_shards": 1}
    undisturbed = tiny_config("dense", tiny_data, tmp_path / "undisturbed", ranks=2, **options)
    assert two_ranks.run(run_training, undisturbed) == [0, 0]

    config = tiny_config("dense", data, tmp_path / "run", ranks=2, **options)
    shard, step = damage_late_shard(data, config)
    assert step > 5
    messages = two_ranks.run(failure, config)
    assert messages[0] == messages[1]
    text, agreed = messages[0]
    assert text.startswith(f"{shard}: damaged, its hash differs from the index; ")
    assert agreed
    assert "\n" not in text
    flip_byte(shard, -1)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text(encoding="utf-8") == f"step_{step - 1:08d}"
    assert two_ranks.run(run_training, config) == [0, 0]
    assert curve(config, "train/loss") == curve(undisturbed, "train/loss")


def remove_a_shard(data: Path) -> str:
    (data / "train" / "shard.00002.mds").unlink()
    return "train/shard.00002.mds: missing, but listed in the index"


def cut_the_index(data: Path) -> str:
    os.truncate(data / "train" / "index.json", 300)
    return "train/index.json: damaged (not valid JSON"


def change_the_tokenizer(data: Path) -> str:
    (data / "tokenizer.json").write_text("another", encoding="utf-8")
    return "tokenizer.json: not the tokenizer that made the ids"


def damage_a_validation_shard(data: Path) -> str:
    flip_byte(data / "validation" / "shard.00000.mds", -1)
    return "validation/shard.00000.mds: damaged"


def test_bad_data_is_one_line_on_every_rank(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    for damage in (remove_a_shard, cut_the_index, change_the_tokenizer, damage_a_validation_shard):
        data = Path(shutil.copytree(tiny_data, tmp_path / damage.__name__))
        expected = damage(data)
        messages = two_ranks.run(failure, tiny_config("dense", data, tmp_path / "run", ranks=2))
        assert messages[0] == messages[1]
        assert f"{data}/{expected}" in messages[0][0]
        assert "mythos data prepare" in messages[0][0] or "prepare the data again" in messages[0][0]
        assert "\n" not in messages[0][0]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"data__sequence_length": 31}, "data.sequence_length = 31: {data} was prepared with 15: set that"),
        ({"model__vocabulary_size": 95}, "model.vocabulary_size = 95: the tokenizer of {data} has 96 tokens"),
        ({"data__cache_directory": "{tmp}", "data__cache_gib": 1e-6}, "data.cache_gib = 1e-06: the shards in use"),
    ],
)
def test_data_that_does_not_fit_the_configuration(
    overrides: dict[str, Any], complaint: str, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = {
        name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in overrides.items()
    }
    with pytest.raises(UserError) as caught:
        open_run_data(tiny_config("dense", tiny_data, tmp_path / "run", **overrides))
    assert str(caught.value).startswith(complaint.format(data=tiny_data))


def test_sources_with_different_tokenizers_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "other", VOCABULARY)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text("another", encoding="utf-8")
    manifest["tokenizer_sha256"] = hashlib.sha256(b"another").hexdigest()
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    config = mixed(tiny_config("dense", tiny_data, tmp_path), {"a": (tiny_data, 1.0), "b": (other, 1.0)})
    with pytest.raises(UserError, match="data.sources: a and b were made by different tokenizers"):
        open_run_data(config)


def test_wrong_options_are_reported_at_once(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("dense", tiny_data, tmp_path)
    with pytest.raises(UserError, match="data.directory = 'both given'"):
        tiny_config("dense", tiny_data, tmp_path, data__sources={"a": {"directory": "x", "weight": 1.0}})
    with pytest.raises(UserError) as caught:
        mixed(config, {"a b": (tiny_data, 1.0), "c": (Path("x"), -1.0)})
    assert "data.sources.c.weight = -1.0: input should be greater than 0" in str(caught.value)
    with pytest.raises(UserError, match="data.sources.a b = 'a b': a name may only contain letters"):
        mixed(config, {"a b": (tiny_data, 1.0)})
    with pytest.raises(UserError, match="data.cache_directory = None: s3://bucket needs"):
        tiny_config("dense", "s3://bucket", tmp_path)  # type: ignore[arg-type]


def test_a_mixture_is_unchanged_by_printing_and_loading_the_configuration(tiny_data: Path, tmp_path: Path) -> None:
    config = mixed(tiny_config("dense", tiny_data, tmp_path), {"web" * 30: (tiny_data, 0.25), "code": (tiny_data, 1.0)})
    assert yaml.safe_load(documented_yaml(config)) == to_dict(config)


def open_own(config: Config, places: list[Path]) -> str:
    """Open another data set on each rank, as if one path had different content on different nodes."""
    own = replace(config, data=replace(config.data, directory=str(places[dist.get_rank()])))
    try:
        open_data_everywhere(own)
    except UserError as error:
        return str(error)
    return "no error"


def test_ranks_that_find_different_data_report_it(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "other", VOCABULARY, seed=1)
    config = tiny_config("dense", tiny_data, tmp_path / "run", ranks=2)
    assert two_ranks.run(open_own, config, [tiny_data, tiny_data]) == ["no error"] * 2
    messages = two_ranks.run(open_own, config, [tiny_data, other])
    assert messages[0] == messages[1]
    assert "data: sources.data.fingerprint is " in messages[0]
    assert "copy the same data set to every node" in messages[0]
