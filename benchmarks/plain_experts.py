"""Speed of a small model with latent attention and experts in plain PyTorch, without DeepSpeed: one process.

python -m benchmarks.plain_experts [WIDTH]

Forward and backward pass of 8 sequences of 256 tokens through 4 loop steps, in fp32, in the model's forms: as written,
with recomputation, compiled. Model FLOPs are those of ``mythos bench``; the peak is that of benchmarks.share_of_peak.
"""

import sys

import torch

from benchmarks.share_of_peak import share_of_peak
from mythos.config.load import validate
from mythos.config.schema import Config
from mythos.model import LoopedTransformer, build_model
from mythos.model.compilation import compile_blocks
from mythos.plan.flops import LoopSteps, training_flops

SEQUENCES, LENGTH, DEPTH, VOCABULARY = 8, 256, 4, 4096
FORMS = {"as written": (False, False), "recomputed": (True, False), "compiled": (False, True)}


def configuration(width: int) -> Config:
    """A core of two layers with 8 experts, of which 2 are chosen; all loop steps carry gradient."""
    heads = width // 64
    attention = {"kind": "mla", "heads": heads, "query_latent_size": width // 2, "key_value_latent_size": width // 4}
    model = {
        "kind": "looped",
        "vocabulary_size": VOCABULARY,
        "width": width,
        **{"prelude_layers": 1, "core_layers": 2, "coda_layers": 1},
        "attention": attention | {"content_head_size": 64, "rotary_head_size": 32, "value_head_size": 64},
        "feed_forward": {"kind": "swiglu", "hidden_size": 2 * width},
        "core_experts": {
            "experts": 8,
            "experts_per_token": 2,
            "expert_hidden_size": width,
            "shared_hidden_size": width,
        },
    }
    tree = {
        "run": {"directory": "unused"},
        "model": model,
        "loop": {"mean_depth": DEPTH, "depth": "fixed", "backprop_depth": DEPTH},
        "train": {"steps": 1, "global_batch_sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
        "optim": {"learning_rate": 1e-3},
        "data": {"directory": "unused", "sequence_length": LENGTH},
    }
    return validate(tree, 1)


def main() -> None:
    config = configuration(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    flops = SEQUENCES * LENGTH * training_flops(config.model, LENGTH, LoopSteps(0, DEPTH))
    for name, (recompute, compiled) in FORMS.items():
        model = build_model(config)
        assert isinstance(model, LoopedTransformer)
        model.loop.recompute = recompute
        if compiled:
            compile_blocks(model)

        def step(model: LoopedTransformer = model) -> float:
            model(tokens, tokens, DEPTH).total.backward()
            model.zero_grad()
            return flops

        print(f"{name}: {share_of_peak(step)}", flush=True)


if __name__ == "__main__":
    main()
