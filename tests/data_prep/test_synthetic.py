"""Synthetic tasks: every answer is right by a slow definition of the task, and the data set is one like any other."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.synthetic import ANSWER, END, PAD, Order, make
from data_prep.synthetic_tasks import TASKS
from data_prep.tokenizer_file import load_tokenizer
from launch.cli import main
from mythos.data.dataset import TokenDataset, answer_targets
from mythos.data.format import BOS


def hop_by_hop(question: list[str]) -> list[str]:
    """Walks back symbol by symbol."""
    hops = question.count(">")
    sequence = question[: len(question) - hops]
    place = len(sequence) - 1
    for _ in range(hops):
        symbol, place = sequence[place], place - 1
        while sequence[place] != symbol:
            place -= 1
        place += 1
    return [sequence[place]]


def add(question: list[str]) -> list[str]:
    first, second = "".join(question).split("+")
    return list(f"{int(first) + int(second):0{len(first) + 1}}")


def carry_out(question: list[str]) -> list[str]:
    things = ["0", "1", "2", "3", "4"]
    for permutation in question:
        things = [things[int(place)] for place in permutation]
    return ["".join(things)]


SOLVE = {"p_hop": hop_by_hop, "addition": add, "permutations": carry_out}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    generator = np.random.default_rng(1)
    for difficulty in (1, 2, 3, 7):
        answers = set()
        for _ in range(60):
            problem = TASKS[task].make(generator, difficulty, 8)
            assert SOLVE[task](problem.question) == problem.answer
            assert len(problem.question) + len(problem.answer) == TASKS[task].longest(difficulty, 8)
            assert {*problem.question, *problem.answer} <= set(TASKS[task].symbols)
            answers.add(tuple(problem.answer))
        assert len(answers) > 3


@pytest.fixture(scope="module", params=list(TASKS))
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / request.param
    arguments = ["--task", request.param, "--difficulty", "3", "--test-difficulty", "4", "--rows", "20"]
    arguments += ["--validation-rows", "2", "--sequence-length", "100", "--output", str(output)]
    assert main(["data", "synthetic", *arguments]) == 0
    return output


def examples(data: Path, split: str) -> list[list[tuple[list[str], list[str]]]]:
    """The (question, answer) pairs of each row."""
    vocabulary = load_tokenizer(data / "tokenizer.json").encoder
    found = []
    for row in TokenDataset(data, split):
        symbols = [vocabulary.id_to_token(number) for number in row]
        text = " ".join(symbol for symbol in symbols if symbol != PAD)
        pairs = [part.removesuffix(f" {END}").split(f" {ANSWER} ") for part in text.split(f"{BOS} ")[1:]]
        found.append([(question.split(), answer.strip().removesuffix(END).split()) for question, answer in pairs])
    return found


def difficulty_of(task: str, question: list[str]) -> int:
    return {"p_hop": question.count(">"), "addition": len(question) // 2, "permutations": len(question)}[task]


def test_rows_hold_whole_examples_of_the_difficulties(data: Path) -> None:
    train, validation = examples(data, "train"), examples(data, "validation")
    task = data.name
    for row in train + validation:
        assert [SOLVE[task](question) for question, _ in row] == [answer for _, answer in row]
    assert {difficulty_of(task, question) for row in train for question, _ in row} == {1, 2, 3}
    by_row = [{difficulty_of(task, question) for question, _ in row} for row in validation]
    assert by_row == [{1}, {1}, {2}, {2}, {3}, {3}, {4}, {4}]


def test_no_problem_is_in_both_splits(data: Path) -> None:
    questions = [
        {tuple(question) for row in examples(data, split) for question, _ in row} for split in ("train", "validation")
    ]
    assert not questions[0] & questions[1]


def test_only_answers_count(data: Path) -> None:
    dataset = TokenDataset(data, "validation")
    vocabulary = load_tokenizer(data / "tokenizer.json").encoder
    rows = dataset.read(np.arange(len(dataset)))
    counted = answer_targets(rows, dataset.manifest.answers)
    answers = [symbol for row in examples(data, "validation") for _, answer in row for symbol in answer]
    assert [vocabulary.id_to_token(number) for number in rows[:, 1:][counted]] == answers
    assert dataset.manifest.splits["validation"].counted_targets == len(answers)


def test_the_data_set_is_valid_and_the_same_again(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(data), "--processes", "1"]) == 0
    assert "valid; train 20 rows, validation 8 rows" in capsys.readouterr().out
    shard = (data / "train" / "shard.00000.mds").read_bytes()
    again = data.with_name(f"{data.name}-again")
    assert make(Order(data.name, 3, 4, 20, 2, 100, 0), again)[1]
    assert (again / "train" / "shard.00000.mds").read_bytes() == shard
    assert not make(Order(data.name, 3, 4, 20, 2, 100, 0), again)[1]
    assert list(again.parent.glob(".*partial")) == []


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "synthetic", "--task", "addition", "--difficulty", "8", "--rows", "5", "--output"]
    assert main([*arguments, str(tmp_path / "a"), "--sequence-length", "20"]) == 2
    assert main([*arguments, str(tmp_path / "b"), "--test-difficulty", "7"]) == 2
    assert main([*arguments, str(tmp_path / "c")]) == 0
    assert main([*arguments, str(tmp_path / "c"), "--seed", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines[:2]] == ["--sequence-length 20", "--test-difficulty 7"]
    assert "an example of difficulty 16 has 53 tokens: give at least 52" in lines[0]
    assert "holds a data set with synthetic" in lines[2]
