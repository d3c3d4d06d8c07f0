"""The whole configuration tree: every option once, with its default, its bounds and one line of documentation.

Values are never written back: what follows from them is a function in ``derive.py``, what must hold between them
and the number of processes is a rule in ``check.py``.
"""

from typing import Annotated, Literal

from pydantic import Field

from mythos.config.model_schema import (
    Model,
)
from mythos.config.option import option, section


@section
class Run:
    """Where a run lives."""

    directory: str = option("directory of the run: config, logs, metrics, checkpoints", changeable=True, min_length=1)


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
    watchdog_s: float = option(
        "seconds without a finished step after which a run that hangs is ended, with every rank's stack in its log",
        600.0,
        changeable=True,
        gt=0,
    )
    spike_sigma: float | None = option(
        "a loss so many standard deviations above its running mean is reported as a spike; null: never",
        6.0,
        changeable=True,
        gt=0,
    )
    spike_rewind: bool = option(
        "after a spike go back to the newest checkpoint and leave out the data of the steps since", False
    )
    max_rewinds: int = option("spikes after which a run goes back, before one ends it", 3, changeable=True, ge=0)
    collapse_steps: int = option(
        "steps in a row in which one expert gets over half of a layer's tokens before it is reported",
        100,
        changeable=True,
        gt=0,
    )


@section
class Preemption:
    """What happens on SIGTERM, SIGUSR1 or Ctrl-C."""

    grace_s: float = option(
        "seconds from the signal to the exit, saved or not; stay below what the scheduler grants",
        110.0,
        changeable=True,
        gt=0,
    )


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
    keep_every: int | None = option(
        "checkpoints of steps that this divides are kept for ever; null: none", None, changeable=True, gt=0
    )
    mode: Literal["sync", "async"] = option(
        "async copies the state to memory and writes it while training goes on; sync waits and needs no copy on a CPU",
        "async",
        changeable=True,
    )
    max_failures: int = option(
        "saves that may fail in a row (disk full or gone) before the run ends", 3, changeable=True, gt=0
    )


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
    preemption: Preemption = option("leaving when asked to", default_factory=Preemption)
    eval: Eval = option("validation", default_factory=Eval)
    data: Data = option("data set")
    log: Log = option("metrics", default_factory=Log)
    sample: Sample = option("text at the end", default_factory=Sample)
