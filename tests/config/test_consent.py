"""Which options may change when a run is resumed."""

from typing import Any

import pytest

from mythos.config.consent import ABSENT, arguments, check_names, differences, is_accepted, refusal
from mythos.config.load import load, to_dict
from mythos.config.option import change_of
from mythos.config.tree import options
from mythos.errors import UserError
from tests.config.test_load import MODEL, RUN


def tree(*overrides: str) -> dict[str, Any]:
    return to_dict(load([MODEL, RUN], overrides, 2))


def test_differences_are_dotted_paths_with_both_values() -> None:
    assert differences(tree(), tree("optim.beta1=0.8", "loop.recompute=false")) == {
        "optim.beta1": (0.9, 0.8),
        "loop.recompute": ("auto", False),
    }
    assert differences({"a": None}, {"a": {"b": 1}}) == {"a": (None, {"b": 1})}
    assert differences({}, {"a": {"b": 1}}) == {"a.b": (ABSENT, 1)}
    assert differences({"a": {"b": 1}}, {}) == {"a.b": (1, ABSENT)}
    assert differences({"a": {}}, {}) == {}


def test_the_weights_and_what_was_trained_on_never_change() -> None:
    asked = {"balance_rate", "balance_loss", "router_z_loss", "ponder_weight"}
    for path, field in options().items():
        if path.split(".")[0] == "model" or path == "data.sequence_length":
            assert change_of(field) == ("ask" if path.split(".")[-1] in asked else "never"), path


def test_another_optimizer_is_one_question_and_its_own_options_are_none() -> None:
    changed = differences(tree(), tree("optim.kind=muon", "optim.muon_momentum=0.9"))
    assert {path.split(".")[0] for path in changed} == {"optim"}
    assert changed["optim.weight_decay"] == (0.1, ABSENT)
    message = refusal(changed, (), {}, False)
    assert message is not None
    assert message.endswith("accept the changes: --accept optim.kind")
    assert refusal(changed, ["optim.kind"], {}, False) is None


def test_options_that_only_one_of_two_versions_has_are_not_asked_about() -> None:
    now = tree()
    before = tree()
    del before["optim"]["beta2"], before["eval"], before["model"]["norm_epsilon"]
    before["optim"]["of_another_version"] = before["future"] = 1
    assert refusal(differences(before, now), (), {}, False) is None
    now["optim"]["beta2"] = 0.5
    assert "optim.beta2: absent -> 0.5" in str(refusal(differences(before, now), (), {}, False)), (
        "the option did not exist before"
    )


def test_only_what_is_named_is_accepted() -> None:
    assert is_accepted("optim.beta1", ["optim.beta1"])
    assert is_accepted("optim.beta1", ["seed", "optim"])
    assert not is_accepted("optim.beta1", ["optim.beta"])
    assert not is_accepted("optim.beta1", [])
    assert not is_accepted("seed", ["seed.more"])
    assert arguments(["seed", "optim.kind"]) == "--accept seed --accept optim.kind"


def test_names_are_those_of_options() -> None:
    check_names(["optim.learning_rate", "optim", "data.sources.web.directory", "data.sources.web", "seed"])
    check_names(["optim.muon_momentum", "model", "model.core_experts.balance_rate", "data.sources", "data"])
    for wrong, hint in (
        ("optim.learning_rte", "did you mean optim.learning_rate"),
        ("yes", "docs/configuration.md"),
        ("data.sources.web.wait", "unknown option"),
        ("", "unknown option"),
        ("model.attention.value_head_size", "a run keeps it"),
        ("data.sequence_length", "a run keeps it"),
    ):
        with pytest.raises(UserError, match=f"--accept {wrong}: .*{hint}"):
            check_names([wrong])
