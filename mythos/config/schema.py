"""The whole configuration tree: every option once, with its default, its bounds and one line of documentation.

Values are never written back: what follows from them is a function in ``derive.py``, what must hold between them
and the number of processes is a rule in ``check.py``.
"""

from typing import Annotated, Literal

from pydantic import Field

from mythos.config.data_schema import Data
from mythos.config.init_schema import Init
from mythos.config.loop_schema import Loop
from mythos.config.model_schema import Model
from mythos.config.optim_schema import COOLDOWN, Optim
from mythos.config.option import Needs, option, section

LOOPED = Needs("model.kind", ("looped",))
LONGEST_S = 10_000_000
"""Of a time limit: 16 weeks; the timers of the operating system overflow above some hundred years."""


@section
class Run:
    """Where the files of a run are."""

    directory: str = option(
        "directory of the run: config, logs, metrics, checkpoints", change="free", path=True, min_length=1
    )


@section
class Train:
    """Length and batch of the training run."""

    steps: int = option("optimizer steps of the whole run", change="rate", gt=0, lt=2**62)
    budgets: tuple[Annotated[int, Field(gt=0, lt=2**62)], ...] | None = option(
        "smaller numbers of steps for which the run also gives a model: learning rates decay to each, then the run "
        "goes back to the checkpoint before the decay; null: none",
        None,
        change="rate",
        needs=COOLDOWN,
    )
    stop_at: int | None = option(
        "steps after which the run pauses, with a checkpoint and a validation; the schedule remains that of "
        "train.steps",
        None,
        change="free",
        gt=0,
        lt=2**62,
    )
    initial_weights: str | None = option(
        "run directory, checkpoint or exported weights whose weights a new run starts from, with its own data, "
        "optimizer and steps; null: random weights",
        None,
        change="ask",
        path=True,
        min_length=1,
    )
    initial_weights_without: tuple[Annotated[str, Field(min_length=1)], ...] | None = option(
        "parameters or modules, by name, that start with random weights all the same; * stands for any text",
        None,
        change="ask",
        needs=Needs("train.initial_weights"),
    )
    global_batch_sequences: int | None = option(
        "sequences in one optimizer step, over all ranks", None, gt=0, change="ask"
    )
    global_batch_tokens: int | None = option("the same in tokens; give one of the two", None, gt=0, change="ask")
    micro_batch_sequences: int = option("sequences that a rank processes at once", change="free", gt=0)
    max_bad_steps: int = option(
        "steps in a row with a non-finite loss or gradient (each is skipped) before the run stops",
        5,
        change="free",
        gt=0,
    )
    z_loss: float = option("weight of the mean squared log-sum-exp of the logits", 0.0, ge=0, change="ask")
    watchdog_s: float = option(
        "seconds without a finished step after which a hanging run is ended, with the stack of every rank in its log",
        600.0,
        change="free",
        gt=0,
        le=LONGEST_S,
    )
    spike_sigma: float | None = option(
        "a loss this many standard deviations above its running mean is reported as a spike; null: never",
        6.0,
        change="free",
        gt=0,
    )
    spike_rewind: bool = option(
        "after a spike return to the newest checkpoint and skip the data of the steps since then",
        False,
        change="ask",
        needs=Needs("train.spike_sigma"),
    )
    max_rewinds: int = option(
        "times that a run returns to a checkpoint after a spike; the next spike ends it",
        3,
        change="free",
        ge=0,
        needs=Needs("train.spike_rewind"),
    )
    collapse_steps: int = option(
        "steps in a row in which one expert gets over half of a layer's tokens before it is reported",
        100,
        change="free",
        gt=0,
        needs=Needs("model.core_experts"),
    )


@section
class Preemption:
    """What happens on a signal to stop (SIGTERM, SIGUSR1, Ctrl-C and others)."""

    grace_s: float = option(
        "seconds from the signal to the exit, saved or not; keep it below what the scheduler grants",
        110.0,
        change="free",
        gt=0,
        le=LONGEST_S,
    )


@section
class Parallel:
    """How the model and its optimizer state are distributed over the ranks."""

    zero_stage: int = option(
        "ZeRO: 0 nothing sharded, 1 optimizer, 2 gradients, 3 weights", 3, change="free", ge=0, le=3
    )
    expert_parallel_size: int | None = option(
        "number of ranks over which one set of experts is distributed; null: the smallest above 1 that keeps a set on "
        "one node and leaves a rank at most 16 GiB of routed experts in bf16, else the largest that keeps a set on one "
        "node; 1 without experts",
        None,
        change="free",
        gt=0,
        needs=Needs("model.core_experts"),
    )
    persistent_parameter_elements: int = option(
        "ZeRO-3 keeps parameters with fewer elements than this unsharded on every rank",
        100_000,
        change="free",
        ge=0,
        needs=Needs("parallel.zero_stage", (3,)),
    )


@section
class Checkpoint:
    """When the run is saved; it is also saved at its end and when it is preempted."""

    every: int = option("steps between checkpoints", 1000, change="free", gt=0)
    keep_last: int = option("number of newest checkpoints that are kept", 2, change="free", gt=0)
    keep_every: int | None = option(
        "checkpoints of steps that are multiples of this are never removed; null: none", None, change="free", gt=0
    )
    mode: Literal["sync", "async"] = option(
        "async copies the state to memory and writes it during training; sync waits and needs no copy on a CPU",
        "async",
        change="free",
    )
    max_failures: int = option(
        "saves that may fail in a row (disk full or unreachable) before the run ends", 3, change="free", gt=0
    )


@section
class Eval:
    """Validation on held-out documents; also done before the first and after the last step."""

    every: int = option("steps between validations", 500, change="free", gt=0)
    depths: tuple[Annotated[int, Field(gt=0, le=10_000)], ...] | None = option(
        "loop depths at which the loss is measured; null: the mean depth", None, change="free", needs=LOOPED
    )
    sequences: int | None = option(
        "validation sequences, a fixed random set of those in the data; null: all", 256, change="free", gt=0
    )
    exit_change: float | None = option(
        "leave the loop when a step changes the state by less than this, relative to its size; null: never",
        None,
        change="free",
        gt=0,
        needs=LOOPED,
    )
    exit_when_halted: bool = option(
        "leave the loop when every token of every rank has halted", False, change="free", needs=Needs("model.halting")
    )


@section
class Log:
    """How often metrics are written."""

    every: int = option("steps between lines in metrics.jsonl and points in TensorBoard", 1, change="free", gt=0)


@section
class Perf:
    """What speed is compared with."""

    peak_flops_per_second: float | None = option(
        "FLOP/s that the device of one rank can do in matrix products, for perf/mfu; null: from the data sheet of a "
        "known GPU in bf16, otherwise measured at the start",
        None,
        change="free",
        gt=0,
        le=10**18,
    )


@section
class Sample:
    """Text written by the model at the end of the run."""

    tokens: int = option("number of tokens; 0: no text", 0, change="free", ge=0, le=1_000_000)
    prompt: str = option("text that the model continues", "", change="free", needs=Needs("sample.tokens"))
    temperature: float = option(
        "softmax temperature; 0 takes the most likely token",
        0.8,
        change="free",
        ge=0,
        le=1000,
        needs=Needs("sample.tokens"),
    )


@section
class Config:
    """The resolved configuration of a run."""

    run: Run = option("where the files of the run are")
    seed: int = option("seed of initial weights, data order and depths", 42, ge=0, lt=2**63, change="ask")
    device: Literal["auto", "cpu", "cuda"] = option("auto takes the GPU when there is one", "auto", change="free")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "type of matrix products; auto is bf16 on a GPU and fp32 on a CPU", "auto", change="ask"
    )
    deterministic: bool = option(
        "on a GPU the same bits in every run, slower", False, change="free", needs=Needs("device", ("auto", "cuda"))
    )
    compile: Literal["auto", "off", "blocks"] = option(
        "blocks: compile dense layers, a minute at each start; auto: on GPUs with triton", "auto", change="free"
    )
    model: Model = option("the architecture")
    init: Init = option("initial weights", default_factory=Init)
    loop: Loop | None = option("the loop of a looped model", None, needs=LOOPED)
    train: Train = option("length and batch")
    optim: Optim = option("optimizer and learning rate")
    parallel: Parallel = option("sharding", default_factory=Parallel)
    checkpoint: Checkpoint = option("saving", default_factory=Checkpoint)
    preemption: Preemption = option("reaction to signals", default_factory=Preemption)
    eval: Eval = option("validation", default_factory=Eval)
    data: Data = option("data set")
    log: Log = option("metrics", default_factory=Log)
    perf: Perf = option("speed", default_factory=Perf)
    sample: Sample = option("text at the end", default_factory=Sample)
