"""An object store: the library's own downloader and boto3, against a server on this machine."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos.config.schema import Config
from mythos.data import remote
from mythos.data.dataset import TokenDataset
from mythos.data.open import open_data
from mythos.errors import UserError
from tests.data.conftest import ROWS
from tests.data.object_store import object_store
from tests.data.test_dataset import flip_byte
from tests.tiny import tiny_config

LENGTH = ROWS["train"]


@pytest.fixture
def bucket(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    remote._threads.__dict__.clear()
    with object_store(data_set) as endpoint:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        yield "s3://bucket"


def bucket_config(bucket: str, cache: Path, **overrides: Any) -> Config:
    options = {
        "model__vocabulary_size": 4096,
        "data__directory": bucket,
        "data__cache_directory": str(cache),
        "data__cache_gib": 0.1,
    }
    return tiny_config("dense", cache, cache, **(options | overrides))


def test_an_object_store_gives_the_same_rows(bucket: str, pristine: Path, tmp_path: Path) -> None:
    data = open_data(bucket_config(bucket, tmp_path / "cache"))
    rows = data.training[0].dataset.read(range(LENGTH))
    np.testing.assert_array_equal(rows, TokenDataset(pristine, "train").read(range(LENGTH)))
    plain = open_data(tiny_config("dense", pristine, tmp_path, model__vocabulary_size=4096))
    assert data.identity == plain.identity, "the same data at another place is the same data"
    assert data.tokenizer.read_bytes() == plain.tokenizer.read_bytes()


def test_a_store_that_never_answers_is_given_up(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE_S", 0.5)
    monkeypatch.setattr(remote, "GIVE_UP_AFTER_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=f"{bucket}/manifest.json: cannot be fetched .*nothing has come for 0.5 s"):
            open_data(bucket_config(bucket, tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_slow_store_is_not_given_up_while_something_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(origin: str, target: str, timeout_s: float) -> None:
        with open(f"{target}.tmp", "ab", buffering=0) as file:
            for _ in range(8):
                file.write(b"x")
                time.sleep(0.25)
        Path(f"{target}.tmp").rename(target)

    monkeypatch.setattr(remote, "SILENCE_S", 1.0)
    monkeypatch.setattr(remote, "_downloader", lambda origin, clients: trickle)
    remote.fetch("s3://bucket/shard", tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == b"x" * 8


def test_what_is_wrong_with_an_object_store_is_one_line(
    bucket: str, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.1,))
    config = bucket_config(bucket, tmp_path / "cache")
    dataset = open_data(config).training[0].dataset
    flip_byte(data_set / "train" / "shard.00000.mds", -1)
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00000.mds: damaged") as caught:
        dataset[0]
    (data_set / "train" / "shard.00001.mds").unlink()
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00001.mds: cannot be fetched .*not found") as caught:
        dataset[25]
    assert "\n" not in str(caught.value)
    (data_set / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{bucket}/manifest.json: cannot be fetched"):
        open_data(config)
    with pytest.raises(UserError, match="unknown kind of store 'ftp'; known are alipan, azure, "):
        open_data(bucket_config("ftp://bucket", tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_store_that_fails_for_a_moment_is_asked_again(
    bucket: str, pristine: Path, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_data(bucket_config(bucket, tmp_path / "cache")).training[0].dataset
    shard = data_set / "train" / "shard.00000.mds"
    away = shard.rename(tmp_path / "away")
    monkeypatch.setattr(remote.time, "sleep", lambda pause_s: away.exists() and away.rename(shard))
    np.testing.assert_array_equal(dataset[0], TokenDataset(pristine, "train")[0])


def test_the_downloaders_come_without_the_rest_of_the_library() -> None:
    code = """
import sys
from mythos.data.remote import _download_module
assert "s3" in _download_module().DOWNLOADER_MAPPINGS
assert not {"transformers", "torchvision", "streaming.base.dataset"} & set(sys.modules)
assert "streaming" not in sys.modules, "no empty shell is left for a later import"
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
