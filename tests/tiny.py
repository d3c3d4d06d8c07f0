"""The tiny models and the tiny configuration that the tests train."""

import copy
from pathlib import Path
from typing import Any

from mythos.config.load import validate
from mythos.config.schema import Config

VOCABULARY = 96
SEQUENCE_LENGTH = 15

BLOCK = {
    "vocabulary_size": VOCABULARY,
    "width": 32,
    "attention": {"kind": "gqa", "heads": 2, "kv_heads": 1, "head_size": 16},
    "feed_forward": {"kind": "swiglu", "hidden_size": 48},
}
LOOPED = BLOCK | {"kind": "looped", "prelude_layers": 1, "core_layers": 2, "coda_layers": 1}
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_hidden_size": 24, "shared_hidden_size": 24}
LATENT = {
    "kind": "mla",
    "heads": 2,
    "query_latent_size": 24,
    "key_value_latent_size": 16,
    "content_head_size": 12,
    "rotary_head_size": 8,
    "value_head_size": 12,
}
LOOP = {"mean_depth": 3, "backprop_depth": 2, "recompute": True}
MODELS: dict[str, dict[str, Any]] = {
    "looped-moe": {"model": LOOPED | {"core_experts": EXPERTS}, "loop": LOOP},
    "looped": {"model": LOOPED, "loop": LOOP},
    "mythos": {  # every option of the mythos presets
        "model": LOOPED
        | {
            "attention": LATENT,
            "core_experts": EXPERTS
            | {"groups": 2, "groups_per_token": 1, "route_scale": 1.5, "balance_loss": 0.01, "router_z_loss": 0.001},
            "loop_embeddings": 3,
            "adapter_rank": 4,
            "adapter_loops": 3,
            "halting": {"ponder_weight": 0.01},
        },
        "loop": LOOP | {"depth": "log_normal_poisson_per_sequence"},
    },
    "newer": {  # what newer work than the published models uses
        "model": LOOPED
        | {
            "core_experts": EXPERTS | {"router_bias_per_loop": 2, "balance_loss": 0.01},
            "injection": "lti_exact",
            "residual_scaling": "loops",
        },
        "loop": {"mean_depth": 3, "backprop_depth": 2},
    },
    "published": {  # the architecture of the parity experiment
        "model": LOOPED
        | {
            "attention": BLOCK["attention"] | {"kv_heads": 2, "value_embeddings": True},
            "feed_forward": {"kind": "relu2", "hidden_size": 64},
        },
        "loop": LOOP,
    },
    "dense": {"model": BLOCK | {"kind": "dense", "layers": 2, "feed_forward": {"kind": "relu2", "hidden_size": 64}}},
}

PUBLISHED_START = {
    "init__token_table": "orthogonal",
    "init__value_tables": "standard_normal",
    "init__value_gates": "uniform",
    "init__key_value": "each",
}
"""The initial weights of the published code, for the model "published"."""


def tiny_config(model: str, data: Path, run: Path, ranks: int = 1, **overrides: Any) -> Config:
    """A validated configuration; ``overrides`` are dotted paths with ``__`` for the dot."""
    tree = copy.deepcopy(MODELS[model]) | {
        "run": {"directory": str(run)},
        "device": "cpu",
        "train": {"steps": 20, "global_batch_sequences": 8, "micro_batch_sequences": 8 // ranks},
        "optim": {"learning_rate": 3e-3, "warmup_steps": 5},
        "parallel": {"zero_stage": 3},
        "eval": {"every": 1000, "sequences": 5},
        "perf": {"peak_flops_per_second": 5e10},  # so that it is not measured at each start
        "data": {"directory": str(data), "sequence_length": SEQUENCE_LENGTH},
    }
    for name, value in overrides.items():
        *sections, option = name.split("__")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[option] = value
    if tree["parallel"]["zero_stage"] == 3:
        tree["parallel"].setdefault("persistent_parameter_elements", 0)
    return validate(tree, ranks)
