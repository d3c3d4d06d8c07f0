"""The option's type decides what its text means, and what Mythos writes, Mythos reads."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos.config.arguments import split_arguments
from mythos.config.data_schema import DataSource
from mythos.config.layers import read_saved
from mythos.config.load import load, load_run, to_dict
from mythos.config.schema import Config
from mythos.config.show import documented_yaml
from mythos.errors import UserError
from mythos.run.directory import RunDirectory, write_config
from tests.config.test_load import CONFIGS, RUN, refused

DENSE = CONFIGS / "model" / "tiny-dense.yaml"
HOSTILE = ["1e3", "695e0514", "010", "2:00", "null", "~", "true", "on", "???", "", " x ", "# x", "Q: what?", "a: [b",
           "${HOME}", "\\${HOME}", "\\\\${seed}", "$", "a\\", "'x'", '"x"', "a\nb\t", "\x85\u2028\ufeff", "---", "<<",
           "=", "!missing x", "&a", "*a", "2026-01-01", ".inf", "{}", "[]", "%"]  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(HOSTILE)
PATHS = TEXTS.filter(lambda text: text and not text.startswith("~") and "$" not in text)
NAMES = st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True) | st.sampled_from(["null", "1e3", "010", "on", "2_0"])
FLOATS = st.floats(min_value=1e-9, max_value=1e12)


def loaded(*overrides: str) -> Config:
    return load([DENSE, RUN], overrides, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=TEXTS,
    directory=PATHS,
    name=NAMES,
    weight=FLOATS,
    rate=FLOATS,
    seed=st.integers(0, 2**63 - 1),
    flag=st.booleans(),
)
def test_what_mythos_writes_it_reads(
    prompt: str, directory: str, name: str, weight: float, rate: float, seed: int, flag: bool
) -> None:
    """config.yaml of a run, as training, `mythos eval` and `mythos export` read it, and what `mythos config` prints."""
    config = load([DENSE, RUN], [], 1)
    config = replace(
        config,
        seed=seed,
        sample=replace(config.sample, prompt=prompt, tokens=3),
        train=replace(config.train, spike_sigma=rate, spike_rewind=flag),
        data=replace(config.data, directory=None, sources={name: DataSource(directory=directory, weight=weight)}),
    )
    with tempfile.TemporaryDirectory() as place:
        config = replace(config, run=replace(config.run, directory=f"{place}/run"))
        saved, printed = RunDirectory(Path(place, "run")).config, Path(place, "printed.yaml")
        saved.parent.mkdir()
        write_config(config)
        printed.write_text(documented_yaml(config), encoding="utf-8")
        assert load([saved], [], 1) == config
        assert load([printed], [], 1) == config
        assert read_saved(saved) == to_dict(config)
        assert load_run(saved).sample.prompt == prompt
        assert load_run(saved).data == config.data


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXTS.filter(lambda text: "${" not in text))
def test_a_text_option_takes_the_text_as_it_is(text: str) -> None:
    assert loaded("sample.tokens=3", f"sample.prompt={text}").sample.prompt == text


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("preemption.grace_s=2:00", "preemption.grace_s = '2:00': input should be a valid number"),
        ("seed=0x10", "seed = '0x10': input should be a valid integer"),
        ("loop.recompute=on", "loop.recompute = 'on': input should be 'auto', True or False"),
        ("data.directory=$HOME/data", "data.directory = '$HOME/data': shell variables are not replaced here: write "
         "${oc.env:HOME}"),
        ("run.directory=~nobody-here/x", "run.directory = '~nobody-here/x': there is no such home directory: give the "
         "whole path, or ./~ for this name"),
    ],
)  # fmt: skip
def test_what_would_be_guessed_is_refused(override: str, line: str) -> None:
    assert refused(override) == [line]


def test_numbers_are_decimal_and_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = loaded("seed=010", "train.steps=1_000", "optim.learning_rate=1e-3", "run.directory=~/x")
    assert (config.seed, config.train.steps, config.optim.learning_rate) == (10, 1000, 1e-3)
    assert config.run.directory == "/home/me/x"
    assert loaded("data.directory=${oc.env:HOME}/data").data.directory == "/home/me/data"
    with pytest.raises(UserError, match=r"data.directory = '\$\{HOME\}/data': .*\$\{oc.env:HOME\}") as error:
        loaded("data.directory=${HOME}/data")
    assert "\n" not in str(error.value)


def test_a_path_may_contain_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_text("seed: 1", encoding="utf-8")
    arguments = ["/data/lr=3e-3/m.yaml", "a=b.yaml", "run.directory=x/y.yaml", "data.direktory=x.yaml"]
    assert split_arguments(arguments) == (arguments[:2], arguments[2:])


def test_a_later_layer_drops_and_adds_sources(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "data: {directory: null, sources: {a: {directory: A, weight: 1}, b: {directory: B, weight: 1}}}",
        encoding="utf-8",
    )
    second.write_text("data: {sources: {b: null, c: {directory: C, weight: 2}}}", encoding="utf-8")
    assert list(load([DENSE, RUN, first, second], [], 2).data.sources) == ["a", "c"]
    assert list(load([DENSE, RUN, first], ["data.sources.b=null"], 2).data.sources) == ["a"]
    assert load([DENSE, RUN, first], ["data.sources=null", "data.directory=x"], 2).data.sources == {}
    with pytest.raises(UserError, match=r"data.sources.q = None: there is none to remove; those before it are: a, b"):
        load([DENSE, RUN, first], ["data.sources.q=null"], 2)
