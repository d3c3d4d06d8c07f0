"""Passwords and values from the environment are in no message, log, journal, TensorBoard file or name of the cache."""

import os
import sys
from pathlib import Path

import pytest
import torch

from launch.cli import main
from mythos.config.load import load, load_run, to_dict
from mythos.config.references import NO_REFERENCES, Reference, references
from mythos.config.schema import Config
from mythos.config.yaml_file import dump
from mythos.data.cache import NodeCache
from mythos.errors import UserError, masked
from mythos.ranks.preemption import StopRequest
from mythos.run import journal
from mythos.run.console import log, start_logging
from mythos.run.directory import RunDirectory
from mythos.train.loop import train
from mythos.train.report import Report
from tests.cluster import REPO
from tests.spawn import RankPool
from tests.tiny import tiny_config

ADDRESS = "sftp://me:PASSWORD@127.0.0.1:1/data"
SHIPPED = [str(REPO / "configs/model/tiny-dense.yaml"), str(REPO / "configs/run/demo.yaml")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{ADDRESS}: no", "sftp://me:***@127.0.0.1:1/data: no"),
        (str(Path(ADDRESS)), "sftp:/me:***@127.0.0.1:1/data"),
        ("a=s3://k:p@b and ftp://u:x@y@h/z", "a=s3://k:***@b and ftp://u:***@h/z"),
        ("http://:p@h", "http://:***@h"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("host:1234 me@host 10:30 http://me@host/a:b", "host:1234 me@host 10:30 http://me@host/a:b"),
        ('{"url": "http://u:p@h", "mail": "a@b"}', '{"url": "http://u:***@h", "mail": "a@b"}'),
    ],
)
def test_only_the_password_is_replaced(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_logs_journal_and_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("dense", tmp_path, tmp_path / "run", data__directory=ADDRESS, data__cache_directory="/cache")
    run = RunDirectory(tmp_path / "run")
    run.logs.mkdir(parents=True)
    start_logging(run.log(0), 0)
    report = Report(config, 0, None, 20, 1e12)
    try:
        report.write_config(NO_REFERENCES)
        try:
            raise ConnectionError(f"{ADDRESS}: refused")
        except ConnectionError:
            log.exception(ADDRESS)
    finally:
        report.close()
        start_logging(None, 0)
    monkeypatch.setattr(sys, "argv", ["mythos", "train", f"data.directory={ADDRESS}"])
    journal.append_event(run.path, journal.STARTED, **journal.environment(["host"], "cpu", "fp32", 1))
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert b"PASSWORD" not in path.read_bytes(), path
    assert "me:***@127.0.0.1" in journal.read_events(run.path)[0]["command"]
    assert "PASSWORD" not in capsys.readouterr().err


def test_messages_and_names_in_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = NodeCache(tmp_path, 1 << 30)
    with pytest.raises(UserError) as error:
        cache.fetch_metadata(ADDRESS, ["manifest.json"])
    assert "sftp://me:***@127.0.0.1:1/data" in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if "PASSWORD" in str(path)]
    assert main(["config", *SHIPPED, f"data.directory={ADDRESS}", "data.cache_gib=0"]) == 2
    assert main(["data", "show", ADDRESS]) == 2
    printed = capsys.readouterr()
    assert "PASSWORD" not in printed.out + printed.err


def train_with(config: Config, known: dict[str, Reference], environ: dict[str, str]) -> int:
    os.environ |= environ
    return train(config, torch.device("cpu"), StopRequest(), (), known)


def test_a_value_from_the_environment_is_in_no_file_of_the_run(
    one_rank: RankPool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at its start nor when it resumes, by its own file."""
    name, value = "MYTHOS_TEST_DATA", str(tiny_data)
    monkeypatch.setenv(name, value)
    run, file = RunDirectory(tmp_path / "run"), tmp_path / "config.yaml"
    options = {"train__steps": 2, "checkpoint__every": 2}
    file.write_text(dump(to_dict(tiny_config("dense", Path("elsewhere"), run.path, **options))), encoding="utf-8")
    for files, overrides in (([file], [f"data.directory=${{oc.env:{name}}}"]), ([run.config], ["checkpoint.every=1"])):
        config, known = load(files, overrides), references(files, overrides)
        assert config.data.directory == value
        assert known == {"data.directory": (f"${{oc.env:{name}}}", value)}
        assert one_rank.run(train_with, config, known, {name: value}) == [0]
        assert f"directory: ${{oc.env:{name}}}\n" in run.config.read_text(encoding="utf-8")
        files_of_run = [path for path in run.path.rglob("*") if path.is_file()]
        assert [path for path in files_of_run if value.encode() in path.read_bytes()] == []
    assert load_run(run.config).data.directory == value, "evaluation reads it from the environment, too"
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=rf"data\.directory = '\$\{{oc\.env:{name}\}}': .*{name}") as refused:
        load_run(run.config)
    assert "\n" not in str(refused.value)
