"""The part of the configuration tree that describes the optimizer: one section per kind, with the same schedule."""

from typing import Annotated, Literal

from pydantic import Field

from mythos.config.option import Needs, option, section

COOLDOWN = Needs("optim.cooldown", ("linear", "cosine"))
ANY_COOLDOWN = Needs("optim.cooldown_fraction")
MOMENTUM_WARMUP = Needs("optim.muon_momentum_warmup_steps")


@section
class OptimCommon:
    """AdamW's options, the learning rate's schedule (linear warm-up, constant, cooldown) and gradient clipping."""

    kind: str = option("which optimizer", change="ask")
    learning_rate: float = option("peak learning rate of AdamW", gt=0, change="ask")
    beta1: float = option("AdamW: decay of the gradient's running mean", 0.9, ge=0, lt=1, change="ask")
    beta2: float = option("AdamW: decay of the squared gradient's running mean", 0.95, ge=0, lt=1, change="ask")
    epsilon: float = option("AdamW: added to the denominator", 1e-8, gt=0, change="ask")
    gradient_clip: float = option(
        "gradients with a larger norm are scaled down to this norm; 0: no clipping", 1.0, ge=0, change="ask"
    )
    warmup_steps: int = option("steps in which learning rates rise linearly from 0", 0, ge=0, change="ask")
    cooldown: Literal["constant", "linear", "cosine"] = option(
        "how learning rates fall at the end; constant: not at all", "linear", change="ask"
    )
    cooldown_fraction: float = option(
        "share of the steps, at the end, in which learning rates fall", 0.5, ge=0, le=1, change="ask", needs=COOLDOWN
    )
    final_learning_rate_fraction: float = option(
        "learning rate after the last step, as a share of the peak",
        0.0,
        ge=0,
        le=1,
        change="ask",
        needs=ANY_COOLDOWN,
    )


@section
class AdamW(OptimCommon):
    """AdamW for all parameters."""

    kind: Literal["adamw"] = option("adamw: AdamW for all parameters", "adamw", change="ask")
    weight_decay: float = option(
        "decoupled weight decay of matrices; embeddings, norms and vectors have none", 0.1, ge=0, change="ask"
    )


@section
class Muon(OptimCommon):
    """Muon for the blocks' matrices and the routed experts, AdamW without weight decay for all other parameters."""

    kind: Literal["muon"] = option(
        "muon: Muon for the blocks' matrices and the routed experts, AdamW for the rest", change="ask"
    )
    muon_learning_rate: float = option("peak learning rate of Muon", 8e-3, gt=0, change="ask")
    muon_momentum: float = option(
        "Muon: decay of the gradient's running mean, after the momentum's warm-up", 0.95, ge=0, lt=1, change="ask"
    )
    muon_momentum_start: float = option(
        "Muon: the same at the first step", 0.85, ge=0, lt=1, change="ask", needs=MOMENTUM_WARMUP
    )
    muon_momentum_warmup_steps: int = option(
        "steps in which Muon's momentum changes linearly from its start to its final value", 300, ge=0, change="ask"
    )
    muon_weight_decay: float = option(
        "Muon: decay at the first step, where update and weight agree in sign",
        0.2,
        ge=0,
        change="ask",
    )
    muon_decay_by_shape: bool = option(
        "Muon: the decay of a matrix with more rows than columns is multiplied by sqrt(rows / columns), as its update "
        "is; the code of arXiv 2604.12946: true",
        False,
        change="ask",
    )
    muon_beta2: float = option(
        "Muon: decay of the running mean of the squared update, one number for each row or column, by whose root the "
        "update is divided (NorMuon, arXiv 2510.05491); 0: not divided; arXiv 2604.12946: 0.95",
        0.0,
        ge=0,
        lt=1,
        change="ask",
    )
    muon_weight_decay_schedule: Literal["linear", "cooldown"] = option(
        "linear: Muon's decay falls to 0 from the first step to train.steps; cooldown: it is constant, then falls as "
        "the learning rates do",
        "linear",
        change="ask",
        needs=Needs("optim.muon_weight_decay"),
    )


Optim = Annotated[AdamW | Muon, Field(discriminator="kind")]
