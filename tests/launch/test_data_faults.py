"""A shard that is found to be damaged during a run, under real launchers: all processes end, with one line in total."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from mythos.config.load import to_dict
from tests.cluster import run
from tests.data.test_open import damage_late_shard
from tests.spawn import Job
from tests.tiny import tiny_config

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "mpiexec": [BIN / "mpiexec", "-n", "2"],
    "torchrun": [BIN / "torchrun", "--nproc-per-node=2", "--no-python"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_processes_end_with_one_line_and_the_run_resumes_after_the_repair(
    launcher: str, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    cache = {"data__cache_directory": str(tmp_path / "cache")} if launcher == "mpiexec" else {}
    config = tiny_config("dense", data, tmp_path / "run", ranks=2, train__steps=14, data__shuffle_shards=1, **cache)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    command = [*LAUNCHERS[launcher], BIN / "mythos", "train", tmp_path / "config.yaml"]

    shard, step = damage_late_shard(data, config)
    done = run(command, limit_s=90)
    assert done.returncode in (1, 2), done.stderr  # torchrun turns every code into 1
    reported = [line for line in done.stderr.splitlines() if str(shard) in line]
    assert len(reported) == 1, done.stderr
    assert reported[0].startswith(f"mythos: {shard}: damaged")
    if launcher == "mpiexec":  # torchrun adds a traceback of its own
        assert "Traceback" not in done.stderr

    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    job = Job(2, main, ["train", str(tmp_path / "config.yaml")], output=tmp_path / "output")
    try:
        assert job.wait(90) == 0, job.text()
    finally:
        job.kill()
    assert f"at step {step - 1} of 14" in job.text()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line)["step"] for line in metrics.splitlines()]
    assert sorted(set(steps)) == list(range(15))
