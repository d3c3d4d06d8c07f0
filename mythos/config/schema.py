"""The whole configuration tree: every option once, with its default, its bounds and one line of documentation.

Values are never written back: what follows from them is a function in ``derive.py``, what must hold between them
and the number of processes is a rule in ``check.py``.
"""

from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

section = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def option(
    documentation: str,
    default: Any = MISSING,
    *,
    changeable: bool = False,
    default_factory: Callable[[], Any] | None = None,
    **bounds: Any,
) -> Any:
    """One option. ``changeable`` options may differ when a run is resumed, the others only if the user agrees."""
    if default_factory is not None:
        bounds["default_factory"] = default_factory
    elif default is not MISSING:
        bounds["default"] = default
    return Field(description=documentation, json_schema_extra={"changeable": changeable}, **bounds)


@section
class Run:
    """Where a run lives."""

    directory: str = option("directory of the run: config, logs, metrics, checkpoints", changeable=True, min_length=1)


@section
class GroupedQuery:
    """Grouped-query attention; multi-head attention when ``kv_heads`` equals ``heads``."""

    kind: Literal["gqa"] = option("gqa: grouped-query attention")
    heads: int = option("number of query heads", gt=0)
    kv_heads: int = option("number of key and value heads; divides heads", gt=0)
    head_size: int = option("channels of one head; even, for rotary embedding", gt=0)
    rope_base: float = option("base of the rotary frequencies", 50_000.0, gt=1)
    qk_norm: bool = option("RMS-normalise queries and keys after rotation (no learned scale)", True)
    value_embeddings: bool = option(
        "add a table looked up by the input token to the values of every second layer", False
    )


@section
class Latent:
    """Multi-head latent attention: queries, keys and values through small latents."""

    kind: Literal["mla"] = option("mla: multi-head latent attention")
    heads: int = option("number of heads", gt=0)
    query_latent_size: int = option("channels of the queries' latent", gt=0)
    key_value_latent_size: int = option("channels of the keys' and values' latent, which is what a cache keeps", gt=0)
    content_head_size: int = option("channels of a head's query and key without rotation", gt=0)
    rotary_head_size: int = option("channels of a head's query and of the shared key with rotation; even", gt=0)
    value_head_size: int = option("channels of a head's value", gt=0)
    rope_base: float = option("base of the rotary frequencies", 50_000.0, gt=1)


Attention = Annotated[GroupedQuery | Latent, Field(discriminator="kind")]


@section
class FeedForward:
    """The dense feed-forward layer."""

    kind: Literal["swiglu", "relu2"] = option("swiglu (gated) or relu2 (squared ReLU, no gate)", "swiglu")
    hidden_size: int = option("channels inside the layer", gt=0)


@section
class MixtureOfExperts:
    """Routed experts and shared experts in place of the core's feed-forward layers."""

    experts: int = option("number of routed experts", gt=1)
    experts_per_token: int = option("routed experts that each token goes to", gt=0)
    expert_hidden_size: int = option("channels inside one routed expert", gt=0)
    shared_hidden_size: int = option("channels inside the shared experts, taken together", gt=0)
    scores: Literal["sigmoid", "softmax"] = option("how router logits become scores", "sigmoid")
    normalise: bool = option("scale the chosen experts' scores to sum 1", True)
    route_scale: float = option("factor on the routed experts' weights", 1.0, gt=0)
    groups: int | None = option("groups of experts; a token chooses groups first (null: no groups)", None, gt=0)
    groups_per_token: int | None = option("groups that each token may choose experts from", None, gt=0)
    balance_rate: float = option("step of the balance bias after each optimizer step; 0 switches it off", 0.001, ge=0)
    balance_loss: float = option("weight of the sequence-wise balance loss", 0.0, ge=0)
    router_z_loss: float = option(
        "weight of the router's z-loss, the mean squared log-sum-exp of its logits", 0.0, ge=0
    )


@section
class Halting:
    """Adaptive computation time: every token weighs the states of its loop steps."""

    ponder_weight: float = option("weight of the ponder cost in the loss", 0.001, ge=0)
    threshold: float = option("a token has halted when its halting probabilities sum to this", 0.99, gt=0, lt=1)


@section
class Looped:
    """Prelude blocks, a core that is run many times with the same weights, coda blocks, tied head."""

    kind: Literal["looped"] = option("looped: recurrent-depth transformer")
    vocabulary_size: int = option("number of token ids", gt=1)
    width: int = option("channels of the residual stream", gt=0)
    prelude_layers: int = option("blocks before the loop", gt=0)
    core_layers: int = option("blocks inside the loop", gt=0)
    coda_layers: int = option("blocks after the loop", gt=0)
    attention: Attention = option("attention of every block")
    feed_forward: FeedForward = option("feed-forward layer of prelude and coda, and of the core unless it has experts")
    core_experts: MixtureOfExperts | None = option("experts of the core's blocks; null: dense core", None)
    injection: Literal["lti", "linear", "additive"] = option(
        "how state and input meet: lti (stable by construction), or for comparison linear (learned map) and additive",
        "lti",
    )
    initial_state: Literal["noise", "zero"] = option("the loop's first state: truncated normal noise, or zero", "noise")
    loop_embeddings: int = option(
        "rows of a table added to the state by loop step; later steps use the last; 0: none", 0, ge=0
    )
    adapter_rank: int = option("rank of the low-rank adapters of each core block, one a loop step; 0: none", 0, ge=0)
    adapter_loops: int = option("loop steps with an adapter of their own; later steps use the last", 1, gt=0)
    halting: Halting | None = option("adaptive computation time; null: the last state counts alone", None)
    norm_epsilon: float = option("added to the mean square in RMSNorm", 1e-5, gt=0)


@section
class Dense:
    """The standard transformer, as the baseline of the looped one: the same blocks, each with its own weights."""

    kind: Literal["dense"] = option("dense: standard fixed-depth transformer")
    vocabulary_size: int = option("number of token ids", gt=1)
    width: int = option("channels of the residual stream", gt=0)
    layers: int = option("number of blocks", gt=0)
    attention: Attention = option("attention of every block")
    feed_forward: FeedForward = option("feed-forward layer of every block")
    norm_epsilon: float = option("added to the mean square in RMSNorm", 1e-5, gt=0)


Model = Annotated[Looped | Dense, Field(discriminator="kind")]


@section
class Loop:
    """How often the core is run; for looped models only."""

    mean_depth: float = option(
        "mean number of loop steps in training; the fixed depth when not random", 8.0, ge=1, le=10_000
    )
    depth: Literal["fixed", "poisson_per_batch", "poisson_per_sequence", "log_normal_poisson_per_sequence"] = option(
        "how depths are drawn in training; every draw is at least 1", "poisson_per_sequence"
    )
    log_normal_sigma: float = option("spread of the log-normal rate of log_normal_poisson_per_sequence", 0.5, gt=0)
    stratified: bool = option(
        "draw the sequences' depths as evenly spread quantiles: every micro batch then costs nearly the same", True
    )
    curriculum_steps: int = option("steps over which the mean depth rises linearly from 1 to mean_depth", 0, ge=0)
    backprop_depth: int = option("the last min(depth, this) loop steps carry gradient", 4, gt=0)
    recompute: bool = option(
        "recompute each loop step in the backward pass instead of keeping its activations", True, changeable=True
    )


@section
class Train:
    """Length and batch of the training run."""

    steps: int = option("optimizer steps of the whole run", changeable=True, gt=0, lt=2**62)
    global_batch_sequences: int | None = option("sequences in one optimizer step, over all ranks", None, gt=0)
    global_batch_tokens: int | None = option("the same in tokens; give one of the two", None, gt=0)
    micro_batch_sequences: int = option("sequences a rank works on at once", changeable=True, gt=0)
    max_bad_steps: int = option(
        "steps in a row with a non-finite loss or gradient (each is skipped) before the run stops",
        5,
        changeable=True,
        gt=0,
    )
    z_loss: float = option("weight of the mean squared log-sum-exp of the logits", 0.0, ge=0)


@section
class Optim:
    """AdamW, or Muon and AdamW; their learning rates: linear warm-up, constant, cooldown."""

    kind: Literal["adamw", "muon"] = option(
        "adamw, or muon: Muon for the blocks' matrices and the routed experts, AdamW for the rest", "adamw"
    )
    learning_rate: float = option("peak learning rate of AdamW", gt=0)
    beta1: float = option("decay of the gradient's running mean", 0.9, ge=0, lt=1)
    beta2: float = option("decay of the squared gradient's running mean", 0.95, ge=0, lt=1)
    epsilon: float = option("added to the denominator", 1e-8, gt=0)
    weight_decay: float = option(
        "AdamW's decoupled decay of matrices when kind is adamw; embeddings, norms and vectors have none", 0.1, ge=0
    )
    muon_learning_rate: float = option("peak learning rate of Muon", 8e-3, gt=0)
    muon_momentum: float = option("decay of the gradient's running mean in Muon, after its warm-up", 0.95, ge=0, lt=1)
    muon_momentum_start: float = option("the same at the first step", 0.85, ge=0, lt=1)
    muon_momentum_warmup_steps: int = option("steps from one to the other, linearly", 300, ge=0)
    muon_weight_decay: float = option(
        "Muon's decay at the first step, where update and weight agree in sign; falls linearly to 0 over train.steps",
        0.2,
        ge=0,
    )
    gradient_clip: float = option(
        "largest gradient norm, larger ones are scaled down to it; 0 switches it off", 1.0, ge=0
    )
    warmup_steps: int = option("steps in which the learning rate rises linearly from 0", 0, ge=0)
    cooldown: Literal["constant", "linear", "cosine"] = option("form of the learning rate's descent", "linear")
    cooldown_fraction: float = option("share of the steps, at the end, in which it descends", 0.5, ge=0, le=1)
    final_learning_rate_fraction: float = option("where the descent ends, as a share of the peak", 0.0, ge=0, le=1)


@section
class Parallel:
    """How the model and its optimizer state are spread over the ranks."""

    zero_stage: int = option(
        "ZeRO: 0 nothing sharded, 1 optimizer, 2 gradients, 3 weights", 3, changeable=True, ge=0, le=3
    )
    expert_parallel_size: int = option("ranks over which one set of experts is spread", 1, changeable=True, gt=0)
    persistent_parameter_elements: int = option(
        "ZeRO-3 keeps parameters with fewer elements than this whole on every rank", 100_000, changeable=True, ge=0
    )


@section
class Checkpoint:
    """When the run is saved; it is also saved at its end and when it is preempted."""

    every: int = option("steps between checkpoints", 1000, changeable=True, gt=0)
    keep_last: int = option("number of newest checkpoints that are kept", 2, changeable=True, gt=0)


@section
class Eval:
    """Validation on held-out documents; also done before the first and after the last step."""

    every: int = option("steps between validations", 500, changeable=True, gt=0)
    depths: tuple[Annotated[int, Field(gt=0, le=10_000)], ...] | None = option(
        "loop depths at which the loss is measured; null: the mean depth", None, changeable=True
    )
    sequences: int = option("validation sequences, fewer if the data has fewer", 256, changeable=True, gt=0)
    exit_change: float | None = option(
        "leave the loop when a step changes the state by less than this, relative to its size; null: never",
        None,
        changeable=True,
        gt=0,
    )
    exit_when_halted: bool = option("leave the loop when every token of every rank has halted", False, changeable=True)


@section
class DataSource:
    """One of several data sets."""

    directory: str = option("prepared data set, as data.directory", changeable=True, min_length=1)
    weight: float = option("its share of the samples, relative to the others", changeable=True, gt=0)


@section
class Data:
    """Prepared data (see `mythos data prepare`): one data set, or several mixed by weight."""

    directory: str | None = option(
        "data set: a path, or the address of an object store (s3://, gs://, oci://, azure://, ...)",
        None,
        changeable=True,
        min_length=1,
    )
    sources: dict[str, DataSource] = option(
        "in place of it, several data sets by name, each with its directory and weight",
        changeable=True,
        default_factory=dict,
    )
    sequence_length: int = option("tokens of one sequence, as the data was prepared", gt=1)
    shuffle_shards: int = option("shards of a data set whose rows are mixed at a time", 32, changeable=True, gt=0)
    cache_directory: str | None = option(
        "directory on each node's own disk for copies of the shards; null: shards are read where they lie",
        None,
        changeable=True,
        min_length=1,
    )
    cache_gib: float = option("largest size of the cache, GiB", 64.0, changeable=True, gt=0)


@section
class Log:
    """How often metrics are written."""

    every: int = option("steps between lines in metrics.jsonl and points in TensorBoard", 1, changeable=True, gt=0)


@section
class Sample:
    """Text written by the model at the end of the run."""

    tokens: int = option("number of tokens; 0: no text", 0, changeable=True, ge=0)
    prompt: str = option("text that it goes on from", "", changeable=True)
    temperature: float = option("softmax temperature; 0 takes the likeliest token", 0.8, changeable=True, ge=0)


@section
class Config:
    """The resolved configuration of a run."""

    run: Run = option("where the run lives")
    seed: int = option("seed of initial weights, data order and depths", 42, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = option("auto takes the GPU when there is one", "auto", changeable=True)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "training type; auto is bf16 on a GPU and fp32 on a CPU", "auto"
    )
    model: Model = option("the architecture")
    loop: Loop | None = option("the loop of a looped model", None)
    train: Train = option("length and batch")
    optim: Optim = option("optimizer and learning rate")
    parallel: Parallel = option("sharding", default_factory=Parallel)
    checkpoint: Checkpoint = option("saving", default_factory=Checkpoint)
    eval: Eval = option("validation", default_factory=Eval)
    data: Data = option("data set")
    log: Log = option("metrics", default_factory=Log)
    sample: Sample = option("text at the end", default_factory=Sample)
