"""The undisturbed run that every disturbed run must equal, and the table of what the faults cost."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.supervise import TABLE, attempt, configuration, consumed, losses

NO_FAULT = {"where": "nowhere", "rank": 0, "call": 0}


@pytest.fixture(scope="session")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[int, list[str]]]:
    """Losses and consumed sequences of a run on two ranks without a fault."""
    config = configuration(tiny_data, tmp_path_factory.mktemp("undisturbed"))
    only = attempt(config, NO_FAULT)
    assert only.exit_code == 0, only.output
    return losses(config), consumed(config)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    write = terminalreporter.write_line
    terminalreporter.section("faults")
    write(f"{'fault':<58} {'detected in s':>13} {'lost steps':>10} recovered")
    for row in TABLE:
        detected = "-" if row.detected_s is None else f"{row.detected_s:.1f}"
        write(f"{row.fault:<58} {detected:>13} {row.lost_steps:>10} {'yes' if row.recovered else 'NO'}")
