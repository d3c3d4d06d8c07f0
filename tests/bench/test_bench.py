"""`mythos bench`: the figures, their arithmetic, and the command from its arguments to its JSON."""

import gc
import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from mythos.bench.measure import Measurement
from mythos.bench.peaks import Peaks, Sizes, measure_peaks
from mythos.bench.report import binary, comparison_rows, part_rows, scaled
from mythos.bench.speed import Speed, SyntheticTokens, measure_speed
from mythos.bench.timeline import Part
from mythos.config.schema import Config
from mythos.plan.flops import TrainingFlops
from tests.cluster import REPO
from tests.spawn import Job, RankPool
from tests.tiny import tiny_config

MODEL = REPO / "configs" / "model" / "tiny-looped-moe.yaml"
BATCH = ["train.micro_batch_sequences=2", "data.sequence_length=8"]


def speed(seconds: float) -> Speed:
    """Of two steps of 100 tokens and 1,000 FLOPs a token, 600 of them in the loop, which takes half of the time."""
    parts = dict.fromkeys(Part, 0.0) | {Part.LOOP: seconds / 2, Part.DATA: seconds / 2}
    flops = TrainingFlops(prelude=100.0, loop=600.0, coda=200.0, head=100.0)
    times = (0.5 * seconds, 1.5 * seconds)
    return Speed(times, 100, flops, seconds, parts, peak_flops_per_second=1e6, peak_memory_gib=1.0)


def test_speed_is_work_over_time() -> None:
    measured = speed(2.0)
    assert measured.tokens_per_second == 50.0
    assert measured.model_flops_per_second == 50_000.0
    assert measured.share_of_peak == 0.05
    assert measured.part_share_of_peak(Part.LOOP) == 100 * 600 / 1.0 / 1e6
    assert measured.part_share_of_peak(Part.DATA) is None
    loop, data = (row for row in part_rows(measured) if row[0] in ("loop", "data"))
    assert loop == ("loop", "1,000.00 ms", "50.0% of the step", "6.0% of the peak")
    assert data == ("data", "1,000.00 ms", "50.0% of the step", "")


def test_a_comparison_has_a_ratio_with_its_spread() -> None:
    rounds = ((speed(1.0), speed(0.5)), (speed(1.0), speed(2.0)))
    rows = comparison_rows(Measurement(Peaks((), (), ()), torch.float32, rounds))
    assert rows == [
        ("round 1", "A 100 tokens/s, B 200 tokens/s"),
        ("round 2", "A 100 tokens/s, B 50 tokens/s"),
        ("B over A", "1.000 (0.500 to 2.000)"),
    ]


def test_numbers_have_the_prefixes_of_their_units() -> None:
    assert [scaled(value) for value in (2.86e10, 999.0, 8.5e-5, 0.0)] == ["28.6 G", "999 ", "85 u", "0 "]
    assert [binary(size) for size in (512, 2**12, 3 * 2**20)] == ["512 B", "4 KiB", "3 MiB"]


def test_synthetic_rows_are_a_function_of_their_sample() -> None:
    config = tiny_config("dense", Path("none"), Path("none"))
    tokens = SyntheticTokens(config)
    rows = tokens.rows(3, 2)
    assert rows.shape == (2, 16)
    assert (rows[1] == tokens.rows(4, 1)).all()
    assert 0 <= rows.min() < rows.max() < config.model.vocabulary_size


def peaks_of_tiny_sizes() -> Peaks:
    return measure_peaks(torch.device("cpu"), [torch.float32], Sizes((8, 16), 1024, (64, 4096)))


def test_the_peaks_are_the_same_on_every_rank(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(peaks_of_tiny_sizes)
    assert first == second
    assert [(rate.dtype, rate.size) for rate in first.matmul] == [("fp32", 8), ("fp32", 16)]
    assert first.matmul_flops_per_second(torch.float32) == max(rate.flops_per_second for rate in first.matmul) > 0
    kinds = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5, "all-to-all": 0.5}
    assert {(rate.kind, rate.bytes) for rate in first.collectives} == {(k, size) for k in kinds for size in (64, 4096)}
    for rate in first.collectives:
        sent = kinds[rate.kind] * rate.bytes
        assert rate.bus_bytes_per_second == pytest.approx(sent / rate.seconds), "what each of two ranks sends"


def bytes_left(config: Config) -> int:
    """By how much the tensors of this process have grown by a measurement."""
    before = bytes_of_tensors()
    measure_speed(config, torch.device("cpu"), warmup=1, peak=1e9)
    return bytes_of_tensors() - before


def bytes_of_tensors() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_next_setting_has_the_memory_of_this_one(stage: int, one_rank: RankPool) -> None:
    options = {"model__vocabulary_size": 5000, "train__steps": 2, "parallel__zero_stage": stage}
    config = tiny_config("looped-moe", Path("none"), Path("none"), **options)
    assert one_rank.run(bytes_left, config)[0] < 5000 * 32 * 4, "less than the token table alone"


def test_two_ranks_measure_two_settings_in_turn(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = ["--steps", "2", "--warmup", "1", "--json", str(output), "--compare", "parallel.zero_stage=2"]
    job = Job(2, main, ["bench", str(MODEL), *BATCH, *options], output=tmp_path / "output")
    assert job.wait(240) == 0, job.text()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["share_of_peak"] == found["model_flops_per_second"] / found["matmul_peak_flops_per_second"]
    assert found["model_flops_per_second"] == pytest.approx(
        found["tokens_per_second"] * found["training_flops_per_token"]
    )
    assert found["tokens_per_step"] == 2 * 2 * 8, "each rank has one micro batch"
    assert len(found["step_seconds"]) == 2 * 2, "two steps in each of two rounds"
    assert found["processor_seconds"] > 0
    assert found["parts"]["loop"]["share_of_peak"] > 0
    assert found["parts"]["communication"]["seconds"] > 0
    settings = found["configuration"], found["comparison"]["configuration"]
    assert [tree["parallel"]["zero_stage"] for tree in settings] == [3, 2]
    ratio = found["comparison"]["ratio"]
    assert ratio["lowest"] <= ratio["mean"] <= ratio["highest"]
    assert "setting B" in job.text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--compare", "loop.recompute=false"],
            "--compare: there is nothing to compare with: give MODEL.yaml RUN.yaml",
        ),
        ([str(MODEL), *BATCH, "--compare", "other.yaml"], "--compare: other.yaml: not of the form key=value"),
        ([str(MODEL), "--json", "no/where.json"], "--json no/where.json: there is no directory no: create it"),
        ([str(MODEL)], "train.micro_batch_sequences = None: required"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert line in capsys.readouterr().err
