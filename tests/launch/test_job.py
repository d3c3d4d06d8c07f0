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
