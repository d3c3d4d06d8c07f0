"""The state of a run: counted step by step, saved as JSON and read back, also from version 0.1."""

import json
from pathlib import Path

from mythos.run.anomalies import LossStatistics
from mythos.run.tensorboard import CurvePosition
from mythos.train.state import RunState

SAVED_BY_0_1 = Path(__file__).parent / "version_0_1" / "published-muon" / "checkpoints" / "step_00000008" / "state.json"


def test_it_survives_json() -> None:
    state = RunState({"seed": 1}, loss=LossStatistics(4.0, 0.5, 60), epochs={"web": 0.25}, text_tokens=0, flops=0.0)
    state.count(8, 120, 117, 3e9, applied=True)
    state.count(8, 120, 119, 4e9, applied=False)
    assert (state.step, state.samples, state.tokens, state.text_tokens) == (2, 16, 240, 236)
    assert state.curve_position == CurvePosition(2, 240, 7)
    assert (state.skipped_steps, state.bad_steps_in_a_row) == (1, 1)
    assert RunState.from_dict(Path("x"), json.loads(json.dumps(state.to_dict() | {"world": {"ranks": 2}}))) == state


def test_a_rewind_keeps_the_position_in_the_data() -> None:
    saved = RunState({"seed": 1}, step=10, samples=80, tokens=1200, loss=LossStatistics(4.0, 0.5, 10))
    now = RunState({"seed": 1}, step=14, samples=112, tokens=1680, rewinds=1)
    rewound = now.rewound_to(saved)
    assert (rewound.step, rewound.samples, rewound.tokens, rewound.rewinds) == (10, 112, 1200, 2)
    assert rewound.loss == saved.loss


def test_the_state_that_version_0_1_saved_is_read() -> None:
    saved = json.loads(SAVED_BY_0_1.read_text(encoding="utf-8"))
    state = RunState.from_dict(Path("x"), saved)
    assert (state.step, state.samples, state.loss.steps) == (8, 64, 8)
    assert state.to_dict() | {"world": saved["world"]} == saved | {
        "run_id": "",
        "updates": 8,
        "decays": [],
        "text_tokens": None,
        "flops": None,
    }
    state.count(8, 120, 117, 3e9, applied=True)
    assert state.text_tokens is None, "those of the steps before are not known"
