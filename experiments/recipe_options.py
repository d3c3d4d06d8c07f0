"""Options of recipes, each alone and all together, against the same model without them.

    python -m experiments.recipe_options published --data demo/data

trains every variant of one study with every seed, skips runs that are finished, and prints a table of losses on the
same validation rows. A seed is the start and the order of the data, which all variants share.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import t

from experiments.sweep import last, train_all

RUN = "configs/run/demo.yaml"
VALIDATION_ROWS = 128
LOSS = "val/loss"
TOGETHER = "all together"
"""The published recipe; beside it a trainer that is written from the paper's equations alone, from the same start."""
COMMON = [
    "parallel.zero_stage=0",
    "optim.kind=muon",
    "optim.learning_rate=8e-3",
    "optim.warmup_steps=0",
    "optim.beta1=0.8",
    "optim.epsilon=1e-10",
    "train.global_batch_sequences=2",
    "train.micro_batch_sequences=2",
    "checkpoint.every=1000",
    "eval.every=1000",
    f"eval.sequences={VALIDATION_ROWS}",
    "sample.tokens=0",
]
WIDTH_128 = [
    "model.width=128",
    "model.attention.heads=2",
    "model.attention.kv_heads=2",
    "model.feed_forward.hidden_size=512",
]
PUBLISHED = {
    "value tables": "init.value_tables=standard_normal",
    "second moment": "optim.muon_beta2=0.95",
    "relu2 factor": "model.feed_forward.relu2_factor=0.5",
    "decay by shape": "optim.muon_decay_by_shape=true",
    "value gates": "init.value_gates=uniform",
    "keys and values": "init.key_value=each",
    "token table": "init.token_table=orthogonal",
    "QK epsilon": "model.attention.qk_norm_epsilon=1.1920929e-7",
}
EXPERTS = [
    "model.core_experts.experts=8",
    "model.core_experts.experts_per_token=2",
    "model.core_experts.expert_hidden_size=344",
    "model.core_experts.shared_hidden_size=344",
]
"""As many active parameters as the feed-forward layers that they replace, within 1%."""
BATCH_OF_4 = ["train.global_batch_sequences=4", "train.micro_batch_sequences=4"]


@dataclass(frozen=True)
class Study:
    """Variants (name -> overrides), of which the first is the base."""

    model: str
    overrides: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    seeds: int
    steps: int
    recipe: Sequence[str] = ("configs/recipe/mythos.yaml",)
    other_models: Mapping[str, str] = field(default_factory=dict)
    """Those of variants that have a model of their own."""

    def files(self, variant: str) -> list[str]:
        return [f"configs/model/{self.other_models.get(variant, self.model)}.yaml", *self.recipe, RUN]


STUDIES = {
    "published": Study(
        "proxy-transformer",
        [*WIDTH_128, "model.layers=4"],
        {"defaults": []}
        | {name: [option] for name, option in PUBLISHED.items()}
        | {TOGETHER: list(PUBLISHED.values())},
        seeds=2,
        steps=240,
        recipe=(),
    ),
    "loops": Study(
        "proxy-looped",
        [*BATCH_OF_4, "eval.depths=[8]"],
        {
            "base": [],
            "exact injection": ["model.injection=lti_exact"],
            "residual 1 / loops": ["model.residual_scaling=loops"],
            "residual 1 / root of loops": ["model.residual_scaling=root_loops"],
        },
        seeds=3,
        steps=80,
    ),
    "router": Study(
        "proxy-looped",
        [*BATCH_OF_4, *EXPERTS, "eval.depths=[8]"],
        {"base": [], "router bias by loop step": ["model.core_experts.router_bias_per_loop=8"]},
        seeds=3,
        steps=80,
    ),
    "middle": Study(
        "proxy-transformer",
        BATCH_OF_4,
        {"standard": [], "middle half twice": ["eval.depths=[2]"]},
        seeds=3,
        steps=120,
        other_models={"middle half twice": "looped-middle-proxy"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default="demo/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe_options"))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    study, runs = STUDIES[arguments.study], arguments.runs / arguments.study
    common = [*COMMON, *study.overrides, f"train.steps={study.steps}", f"data.directory={arguments.data}"]
    losses, by_paper = {}, []
    for variant, own in study.variants.items():
        names = [f"{variant.replace(' ', '-').replace('/', 'over')}-{seed}" for seed in range(study.seeds)]
        overrides = {name: [*common, *own, f"seed={seed}"] for seed, name in enumerate(names)}
        train_all(overrides, study.files(variant), runs, arguments.processes)
        losses[variant] = [last(runs / name, LOSS) or math.nan for name in names]
        if variant == TOGETHER:
            by_paper = [
                by_reference(study.files(variant), given, runs / f"reference-{seed}.txt")
                for seed, given in enumerate(overrides.values())
            ]
    print("\n".join(table(losses)))
    if by_paper:
        print(f"Trained by tests/reference/published.py from the start of {TOGETHER}: {by_paper}")


def by_reference(files: Sequence[str], overrides: Sequence[str], path: Path) -> float:
    """The validation loss after training with tests/reference/published.py, which is kept in a file."""
    if path.exists():
        return float(path.read_text(encoding="utf-8"))
    import torch
    import torch.nn.functional as F

    from mythos.config.derive import global_batch_sequences
    from mythos.config.load import load
    from mythos.data.dataset import TokenDataset
    from mythos.data.stream import Source, TokenStream
    from mythos.eval.batches import validation_rows
    from mythos.model import build_model
    from tests.reference.published import Shape, Weights, logits, train_as_published

    config = load(files, overrides)
    assert config.model.kind == "dense"
    assert config.data.directory is not None
    data, count = Path(config.data.directory), global_batch_sequences(config)
    stream = TokenStream([Source("data", 1.0, TokenDataset(data, "train"))], config.seed, config.data.shuffle_shards)
    batches = [torch.from_numpy(stream.rows(step * count, count)) for step in range(config.train.steps)]
    nothing = [[0] * count] * config.train.steps  # depths and seeds, which a standard transformer does not have
    shape = Shape(config.model.attention.heads, config.model.layers)
    start: Weights = dict(build_model(config).named_parameters())
    _, weights = train_as_published(start, shape, batches, nothing, nothing, config.optim.learning_rate)
    dataset = TokenDataset(data, "validation")
    rows = torch.from_numpy(dataset.read(validation_rows(dataset, config.eval.sequences)))
    with torch.no_grad():
        found = [F.cross_entropy(logits(weights, shape, row[:-1], 0, 0), row[1:]).item() for row in rows]
    path.write_text(str(statistics.mean(found)), encoding="utf-8")
    return statistics.mean(found)


def table(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """The losses, and each variant's mean difference from the first with its interval at 95%.

    The noise of a run is the deviation of what is left of the losses when the means of variants and of seeds are taken
    out, with (variants - 1) (seeds - 1) degrees of freedom: what a seed does to all variants alike is no noise of a
    difference.
    """
    variants, seeds = len(losses), len(next(iter(losses.values())))
    of_seed = [statistics.mean(row[seed] for row in losses.values()) for seed in range(seeds)]
    total, base = statistics.mean(of_seed), statistics.mean(next(iter(losses.values())))
    rest = [
        row[seed] - statistics.mean(row) - of_seed[seed] + total for row in losses.values() for seed in range(seeds)
    ]
    freedom = (variants - 1) * (seeds - 1)
    noise = math.sqrt(math.fsum(value**2 for value in rest) / freedom)
    error = noise * math.sqrt(2 / seeds)
    bound = float(t.ppf(0.975, freedom)) * error
    lines = [
        "| variant | "
        + " | ".join(f"seed {seed}" for seed in range(seeds))
        + " | difference | / its error | verdict |",
        "|---|" + "---|" * (seeds + 3),
    ]
    for number, (variant, row) in enumerate(losses.items()):
        shown, difference = " | ".join(f"{loss:.4f}" for loss in row), statistics.mean(row) - base
        verdict = "not distinguished" if abs(difference) <= bound else "better" if difference < 0 else "worse"
        compared = f"{difference:+.4f} | {difference / error:+.1f} | {verdict}" if number else "| |"
        lines.append(f"| {variant} | {shown} | {compared} |")
    return [*lines, "", f"Noise of a run {noise:.4f}, error of a difference {error:.4f}, interval +-{bound:.4f}."]


if __name__ == "__main__":
    main()
