"""Every number has a sane upper bound, up to which it works."""

import faulthandler
import sys
import threading

import pytest
from annotated_types import Le, Lt

from mythos.config.load import load, options
from mythos.config.option import LARGEST
from mythos.config.schema import LONGEST_S
from mythos.errors import UserError
from tests.cluster import REPO

SHIPPED = [REPO / "configs/model/tiny-looped-moe.yaml", REPO / "configs/run/demo.yaml"]
NUMBERS = (int, float, int | None, float | None)


def test_every_number_has_an_upper_bound() -> None:
    numbers = {path: field for path, field in options().items() if field.annotation in NUMBERS}
    assert len(numbers) > 60
    unbounded = [
        path for path, field in numbers.items() if not any(isinstance(bound, Le | Lt) for bound in field.metadata)
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.watchdog_s=1e10", f"10000000000.0: input should be less than or equal to {LONGEST_S}"),
        ("preemption.grace_s=1e300", "1e+300: input should be less than or equal to"),
        ("data.cache_gib=1e300", "1e+300: input should be less than or equal to 1000000000"),
        ("sample.temperature=1e-40", "1e-40: must be 0, or at least 0.001: the logits"),
        ("sample.tokens=257", "257: at most data.sequence_length (256), as in training"),
        ("checkpoint.every=1000000000001", f"1000000000001: input should be less than or equal to {LARGEST}"),
        ("data.cache_directory=runs/demo/cache", "'runs/demo/cache': is inside run.directory"),
        ("data.cache_directory=./runs/../runs/demo", "'./runs/../runs/demo': is inside run.directory"),
    ],
)
def test_a_value_that_cannot_work_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        load(SHIPPED, ["run.directory=runs/demo", "data.cache_directory=/cache", override], 2)
    option = override.partition("=")[0]
    assert f"{option} = {line}" in str(error.value)
    assert str(error.value).count("\n") == 1


def test_a_cache_beside_the_run_is_accepted() -> None:
    for directory in ("runs/cache", "runs/demo-cache", "runs"):
        load(SHIPPED, ["run.directory=runs/demo", f"data.cache_directory={directory}"], 2)


def test_the_longest_time_limit_fits_the_timers() -> None:
    faulthandler.dump_traceback_later(LONGEST_S, file=sys.__stderr__)
    faulthandler.cancel_dump_traceback_later()
    assert threading.TIMEOUT_MAX > LONGEST_S
