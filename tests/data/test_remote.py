"""Object stores: obstore against a local S3 server, and fsspec against its store in memory."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import oci
import pytest

from mythos.config.schema import Config
from mythos.data import remote
from mythos.data.dataset import TokenDataset
from mythos.errors import UserError
from tests.data.conftest import ROWS, open_run_data
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
    remote._store.cache_clear()
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
    return tiny_config("dense", cache, cache.with_name("run"), **(options | overrides))


def test_an_object_store_gives_the_same_rows(bucket: str, pristine: Path, tmp_path: Path) -> None:
    data = open_run_data(bucket_config(bucket, tmp_path / "cache"))
    rows = data.training[0].dataset.read(range(LENGTH))
    np.testing.assert_array_equal(rows, TokenDataset(pristine, "train").read(range(LENGTH)))
    plain = open_run_data(tiny_config("dense", pristine, tmp_path, model__vocabulary_size=4096))
    assert data.identity == plain.identity, "the identity does not depend on the address"
    assert data.tokenizer.read_bytes() == plain.tokenizer.read_bytes()


def test_a_public_bucket_is_read_without_credentials(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    remote.fetch(f"{bucket}/tokenizer.json", tmp_path / "fetched")
    assert (tmp_path / "fetched").stat().st_size


def test_a_kind_of_store_that_fsspec_knows(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    with fsspec.open("memory://bucket/shard", "wb") as file:
        file.write(content)
    remote.fetch("memory://bucket/shard", tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == content


@pytest.mark.parametrize(
    ("address", "account", "expected"),
    [
        ("azure://acc.blob.core.windows.net/container/a/b", None, ("container", "acc")),
        ("azure://acc.blob.core.windows.net/container/a/b", "other", ("container", "other")),
        ("azure-dl://container/a/b", "acc", ("container", "acc")),
    ],
)
def test_azure_addresses(
    address: str, account: str | None, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container, the account and the path of an address. Nothing is sent."""
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "a2V5")
    if account is None:
        monkeypatch.delenv("AZURE_ACCOUNT_NAME", raising=False)
    else:
        monkeypatch.setenv("AZURE_ACCOUNT_NAME", account)
    remote._store.cache_clear()
    store, path = remote._locate(address)
    assert (store.config["container_name"], store.config["account_name"]) == expected
    assert path == "a/b"


def test_a_key_for_the_s3_interface_of_google(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCS_KEY", "key")
    monkeypatch.setenv("GCS_SECRET", "secret")
    remote._store.cache_clear()
    store, path = remote._locate("gs://bucket/a/b")
    assert store.config["endpoint"] == "https://storage.googleapis.com"
    assert store.config["access_key_id"] == "key"
    assert path == "a/b"


def test_an_oci_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, config: object, timeout: object) -> None:
            assert config == "the configuration"

        def get_namespace(self) -> SimpleNamespace:
            return SimpleNamespace(data="namespace")

        def get_object(self, *address: str) -> SimpleNamespace:
            assert address == ("namespace", "bucket", "a/b")
            raw = SimpleNamespace(stream=lambda chunk_bytes, decode_content: iter([b"x", b"y"]))
            return SimpleNamespace(data=SimpleNamespace(raw=raw))

    monkeypatch.setattr(oci.config, "from_file", lambda: "the configuration")
    monkeypatch.setattr(oci.object_storage, "ObjectStorageClient", Client)
    remote.fetch("oci://bucket@namespace/a/b", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"xy"


def test_a_store_that_never_responds_is_given_up(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE_S", 0.5)
    monkeypatch.setattr(remote, "GIVE_UP_AFTER_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never responds
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=f"{bucket}/manifest.json: cannot be fetched .*nothing received for 0.5 s"):
            open_run_data(bucket_config(bucket, tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_slow_store_is_not_given_up_while_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(origin: str) -> Iterator[bytes]:
        for _ in range(8):
            time.sleep(0.25)
            yield b"x"

    monkeypatch.setattr(remote, "SILENCE_S", 1.0)
    monkeypatch.setattr(remote, "_object_chunks", trickle)
    remote.fetch("s3://bucket/shard", tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == b"x" * 8


def test_problems_of_an_object_store_are_reported_in_one_line(
    bucket: str, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.1,))
    config = bucket_config(bucket, tmp_path / "cache")
    dataset = open_run_data(config).training[0].dataset
    flip_byte(data_set / "train" / "shard.00000.mds", -1)
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00000.mds: damaged") as caught:
        dataset[0]
    (data_set / "train" / "shard.00001.mds").unlink()
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00001.mds: cannot be fetched .*not found") as caught:
        dataset[25]
    assert "\n" not in str(caught.value)
    (data_set / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{bucket}/manifest.json: cannot be fetched"):
        open_run_data(config)
    with pytest.raises(UserError, match="unknown kind of store 'gopher'; use s3, gs, azure, hf or one that fsspec"):
        open_run_data(bucket_config("gopher://bucket", tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_full_disk_is_not_blamed_on_the_store(bucket: str) -> None:
    with pytest.raises(OSError, match="No space left"):
        remote.fetch(f"{bucket}/tokenizer.json", Path("/dev/full"))


def test_a_store_that_fails_for_a_moment_is_tried_again(
    bucket: str, pristine: Path, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_run_data(bucket_config(bucket, tmp_path / "cache")).training[0].dataset
    shard = data_set / "train" / "shard.00000.mds"
    away = shard.rename(tmp_path / "away")
    monkeypatch.setattr(remote.time, "sleep", lambda pause_s: away.exists() and away.rename(shard))
    np.testing.assert_array_equal(dataset[0], TokenDataset(pristine, "train")[0])


def test_a_download_imports_neither_torch_nor_streaming(bucket: str, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mythos.data import remote
remote.fetch(sys.argv[1] + "/tokenizer.json", Path(sys.argv[2]))
assert not {"torch", "transformers", "streaming"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, bucket, tmp_path / "fetched"]
    assert subprocess.run(command, check=False).returncode == 0
