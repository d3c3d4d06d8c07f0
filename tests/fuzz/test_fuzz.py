"""Every reader of files with damaged ones, for some seconds; `python -m benchmarks.fuzz` runs longer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import Target, corpus, damaged, targets, try_one

EXAMPLES, DEADLINE_MS = 400, 5000


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_valid_files_are_accepted(readers: dict[str, Target]) -> None:
    assert [name for name, target in readers.items() if try_one(target, target.content)] == []


def test_the_corpus_is_one_line(readers: dict[str, Target]) -> None:
    for target in readers.values():
        for content in corpus():
            try_one(target, content)


@settings(
    max_examples=EXAMPLES,
    deadline=DEADLINE_MS,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_file_is_one_line(readers: dict[str, Target], data: st.DataObject) -> None:
    target = readers[data.draw(st.sampled_from(sorted(readers)))]
    try_one(target, data.draw(damaged(target.content)))


def test_every_reader_finds_damage(readers: dict[str, Target]) -> None:
    """Otherwise the examples would show nothing: these files are never accepted, and shown by `mythos status`."""
    tolerant = {"run-metrics.jsonl", "run-events.jsonl", "run-environment.json"}
    tolerant |= {"run-checkpoints-latest", "run-.lock", "parts-p.json"}
    accepted = {name for name, target in readers.items() if not try_one(target, b'{"x": [1]}')}
    assert accepted == tolerant
