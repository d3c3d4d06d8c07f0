import pytest

from launch.cli import main

SHIPPED = ["configs/model/tiny-looped-moe.yaml", "configs/run/demo.yaml"]


def test_it_takes_the_arguments_of_train_and_prints_nodes_and_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *SHIPPED,
        "--accept",
        "optim.learning_rate",
        "run.directory=some/where",
        "train.global_batch_sequences=16",
        "train.micro_batch_sequences=4",
    ]
    assert main(["job", "--nodes", "3", "--tasks-per-node", "2", *words]) == 0
    assert capsys.readouterr().out == "2 some/where\n", "16 sequences do not divide over 6 processes"


def test_a_name_that_is_no_option_cannot_be_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "--nodes", "1", "--tasks-per-node", "2", *SHIPPED, "--accept", "optim.learning_rte"]) == 2
    assert "--accept optim.learning_rte: unknown option; did you mean optim.learning_rate?" in capsys.readouterr().err
