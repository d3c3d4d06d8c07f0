"""Ranks that differ, cannot do their work or are badly placed are named before the first step."""

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import groups

from mythos.config.data_schema import Data
from mythos.config.schema import Config, Run
from mythos.errors import UserError
from mythos.ranks import group, preflight, variables
from mythos.run import journal
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_training

CPU = torch.device("cpu")


def on_rank_1(change: Callable[[preflight.RankReport], preflight.RankReport], config: Config) -> str:
    """The error that all ranks raise when rank 1's report is changed."""
    original = preflight.own_report
    if group.dist.get_rank() == 1:
        preflight.own_report = lambda *arguments: change(original(*arguments))
    try:
        preflight.check_ranks(config, CPU)
    except UserError as error:
        return str(error) if error.agreed else f"on rank {group.dist.get_rank()} alone: {error}"
    finally:
        preflight.own_report = original
    return "no error"


def other_torch(report: preflight.RankReport) -> preflight.RankReport:
    return replace(report, host="node7", versions=dict(report.versions) | {"torch": "1.13.0"})


def other_code(report: preflight.RankReport) -> preflight.RankReport:
    return replace(report, versions=dict(report.versions) | {"code": "000000000000"})


def other_seed(report: preflight.RankReport) -> preflight.RankReport:
    return replace(report, options=dict(report.options) | {"seed": 7})


def unchanged(report: preflight.RankReport) -> preflight.RankReport:
    return report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_torch, f"rank 1 on node7: torch '1.13.0', elsewhere '{torch.__version__.split('+')[0]}"),
        (other_code, f"code '000000000000', elsewhere '{preflight.code_version()}': run the same environment"),
        (other_seed, "option seed 7, elsewhere 42: give every rank the same configuration"),
        (unchanged, "no error"),
    ],
)
def test_every_rank_reports_which_rank_differs_and_how(
    change: Callable[[preflight.RankReport], preflight.RankReport], message: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    errors = two_ranks.run(on_rank_1, change, tiny_config("looped", tmp_path, tmp_path / "run", ranks=2))
    assert errors[0] == errors[1]
    assert message in errors[0]


def test_the_rank_that_differs_from_the_majority_is_named() -> None:
    report = preflight.RankReport(0, "a", "cpu", None, {"torch": "2"}, {})
    reports = [replace(report, versions={"torch": "1"}), replace(report, rank=1), replace(report, rank=2)]
    assert preflight.differing(reports) == [
        "rank 0 on a: torch '1', elsewhere '2': run the same environment on every node"
    ]


def test_the_code_version_changes_with_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = preflight.code_version()
    copy = shutil.copytree(Path(preflight.mythos.__file__).parent, tmp_path / "mythos")
    monkeypatch.setattr(preflight.mythos, "__file__", str(copy / "__init__.py"))
    assert preflight.code_version.__wrapped__() == before, "it does not depend on the path"
    with (copy / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert preflight.code_version.__wrapped__() != before


def test_two_ranks_that_share_a_gpu_are_named() -> None:
    report = preflight.RankReport(0, "a", "cuda:0 H100", "GPU-1", {}, {})
    good = [report, replace(report, rank=1, gpu="GPU-2"), replace(report, rank=2, host="b")]
    assert preflight.shared_gpus(good) == []
    (line,) = preflight.shared_gpus([*good, replace(report, rank=3, host="b")])
    assert line.startswith("rank 3 on b: has the same GPU as rank 2")


def test_a_set_of_experts_across_nodes_gives_a_warning() -> None:
    across = preflight.expert_groups_across_hosts
    assert across(1, ["a", "b"]) is None
    assert across(2, ["a", "a", "b", "b"]) is None
    assert "ranks 0 to 3 share a set of experts across 2 nodes (a, b)" in str(across(4, ["a", "a", "b", "b"]))
    assert "ranks 2 to 3" in str(across(2, ["a", "a", "a", "b", "b", "b"]))


def test_deepspeed_gives_a_set_of_experts_to_consecutive_ranks() -> None:
    found, _ = groups._get_expert_parallel_ranks(world_size=8, tensor_parallel_size_=1, expert_parallel_size_=4)
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7]]


def failure(config: Config, break_rank_1: Callable[[], None] | None = None) -> str:
    if break_rank_1 is not None and group.dist.get_rank() == 1:
        break_rank_1()
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return "no error"


def no_data_here() -> None:
    """As on a node where the file system is not mounted."""
    original = preflight.open_data

    def open_data(data: Data, *others: Any) -> object:
        preflight.open_data = original
        return original(replace(data, directory="/not/mounted"), *others)

    preflight.open_data = open_data  # type: ignore[assignment]


def no_run_directory_here() -> None:
    original = preflight._check_writable

    def check(run: Run) -> None:
        preflight._check_writable = original
        original(replace(run, directory="/not/mounted"))

    preflight._check_writable = check


def test_a_path_missing_on_one_rank_is_reported_with_its_place(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    host = socket.gethostname()
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=1)
    for error in two_ranks.run(failure, config, no_data_here):
        assert error.startswith("/not/mounted/manifest.json: no such file")
        assert error.endswith(f"(rank 1 on {host})")
    for error in two_ranks.run(failure, config, no_run_directory_here):
        assert error.startswith("run.directory = '/not/mounted': cannot be written: No such file or directory")
        assert error.endswith(f"(rank 1 on {host})")


def test_an_address_that_does_not_resolve_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError, match="MASTER_ADDR = 'no-such-host.invalid' does not resolve here"):
        group.start("cpu")


# ---- GPUs, simulated


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("SLURM_STEP_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_local_rank_chooses_the_gpu(eight_gpus: pytest.MonkeyPatch) -> None:
    eight_gpus.setenv("LOCAL_RANK", "5")
    assert group.choose_device("auto") == torch.device("cuda", 5)
    assert group.choose_device("cpu") == CPU
    eight_gpus.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match="needs GPU 8 of its node, which has 8"):
        group.choose_device("cuda")


def test_a_process_that_sees_only_its_own_gpu_takes_it(eight_gpus: pytest.MonkeyPatch) -> None:
    eight_gpus.setattr(torch.cuda, "device_count", lambda: 1)  # as under srun --gpus-per-task=1
    eight_gpus.setenv("LOCAL_RANK", "3")
    assert group.choose_device("auto") == torch.device("cuda", 0)


def test_gpus_communicate_by_nccl_and_compute_in_bf16(eight_gpus: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mythos.engine.sections import deepspeed_config, precision, training_dtype

    calls: list[object] = []
    place = {"LOCAL_RANK": "2", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    eight_gpus.setattr(os, "environ", place)
    eight_gpus.setattr(group, "_store", None)
    eight_gpus.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    eight_gpus.setattr(torch, "set_num_threads", lambda count: None)  # the tests after this one need their own
    eight_gpus.setattr(
        group.dist, "init_process_group", lambda backend, device_id, **__: calls.append((backend, device_id))
    )
    device = group.start("auto", check=lambda device: calls.append(("check", device)))
    # NCCL connects the ranks at once: whether they match is checked before that.
    assert calls == [("set_device", device), ("check", device), ("nccl", device)]
    assert device == torch.device("cuda", 2)
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert os.environ["LOCAL_RANK"] == "2"
    assert not torch.are_deterministic_algorithms_enabled(), "unless it is asked for, determinism costs nothing"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

    # srun --gpus-per-task=1 shows each process one GPU: DeepSpeed must choose number 0 as well.
    eight_gpus.setattr(torch.cuda, "device_count", lambda: 1)
    assert group.start("auto") == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"

    config = tiny_config("looped-moe", tmp_path, tmp_path / "run")
    assert precision(config, device) == "bf16"
    assert precision(config, CPU) == "fp32"
    assert training_dtype(config, device) == torch.bfloat16
    assert deepspeed_config(config, 1, device)["zero_optimization"]["overlap_comm"]


def test_the_allocator_grows_its_blocks_unless_the_user_has_chosen_otherwise() -> None:
    environ: dict[str, str] = {}
    variables.set_training_variables("cuda", environ)
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not any("ASYNC_ERROR_HANDLING" in name for name in environ), "torch's own default is safer"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environ = {name: "max_split_size_mb:64"}
        variables.set_training_variables("cuda", environ)
        assert {name: value for name, value in environ.items() if "ALLOC" in name} == {name: "max_split_size_mb:64"}


def test_a_package_that_is_not_installed_is_recorded_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PACKAGES", ("numpy", "no-such-package", "mythos"))
    assert preflight.versions()["no-such-package"] is None
    assert preflight.versions()["numpy"] == np.__version__


def test_batches_reach_a_gpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from mythos.train.batch import micro_batch

    calls: list[object] = []

    class Rows(torch.Tensor):
        def pin_memory(self, *_: object) -> "Rows":  # type: ignore[override]
            calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
            calls.append((device, non_blocking))
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(torch, "from_numpy", lambda array: torch.as_tensor(array).as_subclass(Rows))
    gpu = torch.device("cuda", 0)
    batch = micro_batch(np.arange(12).reshape(3, 4), None, gpu)
    assert calls == ["pinned", (gpu, True)] * 2
    assert batch.tokens.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert batch.targets.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    calls.clear()
    micro_batch(np.arange(12).reshape(3, 4), None, CPU)
    assert calls == []


def test_variables_are_set_only_if_the_user_has_not_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    environ = {"NCCL_DEBUG": "INFO", "LOCAL_WORLD_SIZE": "4"}
    variables.set_training_variables("cuda", environ)
    assert environ["NCCL_DEBUG"] == "INFO"
    assert (environ["DS_ACCELERATOR"], environ["OMP_NUM_THREADS"]) == ("cuda", "4")

    environ = {"OMP_NUM_THREADS": "3"}
    variables.set_training_variables("cpu", environ)
    assert environ == {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu"}
    assert variables.threads_per_process({"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "8"}) == 8
    assert variables.threads_per_process({"LOCAL_WORLD_SIZE": "99"}) == 1

    environ = {"RAYON_NUM_THREADS": "4"}
    variables.set_data_variables(environ)
    assert environ == {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(("set_by_user", "calls"), [(None, [16]), ("3", [])])
def test_torch_gets_its_share_of_the_cores_unless_the_user_has_set_threads(
    set_by_user: str | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if set_by_user is not None:
        environ["OMP_NUM_THREADS"] = set_by_user
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    monkeypatch.setattr(group, "_store", None)
    monkeypatch.setattr(group.dist, "init_process_group", lambda backend, **__: None)
    group.start("cpu")
    assert called == calls
