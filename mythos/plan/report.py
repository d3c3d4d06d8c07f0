"""A plan for people: the rows of its tables."""

from collections.abc import Mapping

from mythos.config.derive import micro_steps, tokens_per_step
from mythos.plan.cache import cached_channels
from mythos.plan.cluster import GIB, Cluster
from mythos.plan.communication import Collective
from mythos.plan.flops import attention_flops
from mythos.plan.plan import CACHE_ELEMENT_BYTES, Plan
from mythos.plan.speed import nodes, seconds
from mythos.plan.tensors import attention_shapes, matrix_elements

Rows = list[list[str]]


def model_rows(plan: Plan) -> Rows:
    """Parameters by part and in sum, FLOPs a token, loop steps, the cache."""
    count, flops = plan.parameters, plan.flops
    sums = {"total": count.total, "active": count.active, "lookup tables": count.tables, "matrices": count.matrices}
    rows = [[f"parameters: {name}", f"{number:,}"] for name, number in (count.parts | sums).items()]
    for name, full, causal in (
        ("training", flops.training, flops.training_causal),
        ("inference", flops.inference, flops.inference_causal),
    ):
        rows.append(
            [f"{name} GFLOP a token", f"{full / 1e9:.3f} (attention over earlier tokens only: {causal / 1e9:.3f})"]
        )
    if plan.config.loop is not None:
        again = "" if plan.recompute else ", not used"
        rows.append(["recomputation GFLOP a token", f"{flops.recomputation / 1e9:.3f}{again}"])
        loops = plan.loops
        rows.append(["loop steps of a sequence", f"{loops.mean:.2f}, {loops.mean_with_grad:.2f} with gradient"])
        rows.append(["loop steps of a micro-step", f"{loops.executed:.1f}: those of its deepest sequence"])
    rows.append(["cache of a sequence at inference", binary(plan.cache_bytes_per_sequence)])
    return rows


def memory_rows(plan: Plan) -> Rows:
    """Memory of a GPU by kind."""
    rows = [[name, binary(size)] for name, size in plan.memory.kinds().items() if size]
    rows.append(["peak", f"{binary(plan.memory.peak)} of {binary(plan.cluster.usable_bytes)}: {_fits(plan)}"])
    if plan.config.loop is not None:
        asked, choice = plan.config.loop.recompute, "on" if plan.recompute else "off"
        rows.append(["recomputation", f"{choice} (loop.recompute={str(asked).lower()})"])
        rows.append(["peak with recomputation", binary(plan.peak_with_recomputation)])
        rows.append(["peak without recomputation", binary(plan.peak_without_recomputation)])
    host = plan.cluster.host_memory_gib * GIB
    rows.append(["host memory of a node, for saving", f"{binary(plan.host_bytes)} of {binary(host)}"])
    return rows


def _fits(plan: Plan) -> str:
    return "fits" if plan.fits else f"does NOT fit ({plan.limit})"


def communication_rows(plan: Plan) -> Rows:
    """One row for each purpose: the group, calls and bytes of a step, its time, and whether the computation waits."""
    return [_collective_row(each, plan.cluster) for each in plan.collectives]


def _collective_row(collective: Collective, cluster: Cluster) -> list[str]:
    group = collective.group
    across = nodes(group)
    place = "inside nodes" if across == 1 else f"across {across:g} nodes"
    return [
        collective.purpose,
        collective.kind.replace("_", "-"),
        f"{group.ranks} GPUs, {place}",
        f"{collective.calls:,.4g} calls",
        binary(collective.bytes),
        duration(seconds(collective, cluster)),
        "waits" if collective.waited else "beside",
    ]


def time_rows(plan: Plan) -> Rows:
    """The parts of a step, and speed."""
    time = plan.time
    parts = {
        "matrix products": time.products,
        "memory traffic": time.elementwise,
        "optimizer": time.update,
        "starting kernels": time.host,
        "exposed communication": time.exposed,
        "data": time.data,
    }
    rows = [[name, duration(value), f"{value / time.total:.0%}"] for name, value in parts.items()]
    rows.append(["step", duration(time.total), f"limited by {plan.limit}"])
    rows.append(["hidden communication", duration(time.hidden), ""])
    rows.append(["MFU", f"{plan.mfu:.1%}", ""])
    rows.append(
        ["tokens/s", f"{plan.tokens_per_second:,.0f}", f"{plan.tokens_per_second / plan.layout.ranks:,.0f} a GPU"]
    )
    return rows


def cost_rows(plan: Plan) -> Rows:
    """The whole run, checkpoints and failures."""
    cost, config = plan.cost, plan.config
    tokens = config.train.steps * tokens_per_step(config)
    every = config.checkpoint.every
    return [
        ["run", f"{config.train.steps:,} steps, {tokens / 1e9:,.4g} billion tokens"],
        ["time", f"{cost.days:,.3g} days"],
        ["GPU hours", f"{cost.gpu_hours:,.0f}"],
        ["price", f"${cost.dollars:,.0f}"],
        ["checkpoint", f"{binary(cost.checkpoint_bytes)}, saved in {duration(cost.save_seconds)}"],
        ["training stops for a save", duration(cost.stall_seconds)],
        ["best interval (Young, Daly)", f"{cost.best_interval_steps:,} steps, {duration(cost.best_interval_seconds)}"],
        ["failures", f"every {cost.hours_between_failures:,.3g} hours"],
        ["goodput", f"{cost.goodput:.2%} at checkpoint.every={every}, {cost.best_goodput:.2%} at the best"],
    ]


def layout_cells(plan: Plan) -> list[str]:
    """One row of a search."""
    return [
        f"{plan.layout.nodes}",
        f"{plan.layout.ranks}",
        f"{plan.config.train.micro_batch_sequences}",
        f"{micro_steps(plan.config, plan.layout.ranks)}",
        f"{plan.config.parallel.zero_stage}",
        f"{plan.layout.expert_parallel_size}",
        "-" if plan.config.loop is None else "on" if plan.recompute else "off",
        binary(plan.memory.peak),
        duration(plan.time.total),
        f"{plan.mfu:.1%}",
        f"{plan.cost.days:,.3g}",
        f"{plan.cost.dollars:,.0f}",
        plan.limit,
    ]


LAYOUT_HEADERS = (
    *("nodes", "GPUs", "micro batch", "accumulation", "ZeRO", "EP", "recompute", "memory", "step"),
    *("MFU", "days", "dollars", "limited by"),
)


def comparison_rows(plans: Mapping[str, Plan]) -> Rows:
    """Side by side: sizes, speed, the run at equal tokens, and the tokens at the first one's FLOPs."""
    columns = [_comparison(plan, next(iter(plans.values()))) for plan in plans.values()]
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _comparison(plan: Plan, first: Plan) -> dict[str, str]:
    model, length = plan.config.model, plan.config.data.sequence_length
    tokens = plan.config.train.steps * tokens_per_step(plan.config)
    run_flops = tokens * plan.flops.training
    equal = tokens * first.flops.training / plan.flops.training
    attention = model.attention
    return {
        "width": f"{model.width:,}",
        "attention": attention.kind,
        "parameters": f"{plan.parameters.total:,}",
        "active": f"{plan.parameters.active:,}",
        "lookup tables": f"{plan.parameters.tables:,}",
        "attention of a layer: parameters": f"{matrix_elements(attention_shapes(model.width, attention)):,}",
        "attention of a layer: MFLOP a token": f"{attention_flops(model.width, attention, length) / 1e6:,.2f}",
        "cache of a layer: bytes a token": f"{cached_channels(attention) * CACHE_ELEMENT_BYTES:,}",
        "cache of a sequence": binary(plan.cache_bytes_per_sequence),
        "training GFLOP a token": f"{plan.flops.training / 1e9:.3f}",
        "inference GFLOP a token": f"{plan.flops.inference / 1e9:.3f}",
        "memory of a GPU": binary(plan.memory.peak),
        "tokens/s": f"{plan.tokens_per_second:,.0f}",
        "MFU": f"{plan.mfu:.1%}",
        "equal tokens: billions": f"{tokens / 1e9:,.4g}",
        "equal tokens: training FLOP": f"{run_flops:.3g}",
        "equal tokens: GPU hours": f"{plan.cost.gpu_hours:,.0f}",
        "equal tokens: dollars": f"{plan.cost.dollars:,.0f}",
        "equal FLOPs: billions of tokens": f"{equal / 1e9:,.4g}",
        "equal FLOPs: GPU hours": f"{plan.cost.gpu_hours * equal / tokens:,.0f}",
        "equal FLOPs: dollars": f"{plan.cost.dollars * equal / tokens:,.0f}",
    }


def binary(size: float) -> str:
    """Bytes with three digits: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB" if size < 1024 else f"{size / 1024:,.3g} PiB"


def duration(time_s: float) -> str:
    """Seconds with three digits and a fitting unit."""
    if time_s >= 5400:
        return f"{time_s / 3600:,.3g} h"
    if time_s >= 90:
        return f"{time_s / 60:.3g} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time_s >= scale:
            return f"{time_s / scale:.3g} {unit}"
    return f"{time_s * 1e6:.3g} us"
