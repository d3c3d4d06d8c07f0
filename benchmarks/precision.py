"""Forms of training in bf16 against fp32, on two ranks: errors of loss and gradients, curves, memory, time.

For ZeRO 1, 2 and 3, with and without experts, and T loop steps that all carry gradient: the relative error of the loss
and of all gradients (two micro batches, summed over both ranks) in the first step, and the mean and largest relative
distance of the losses of 50 steps. Memory is that of rank 0: what the engine keeps between steps, and what the forward
pass of one micro batch keeps for the backward pass. Forms:

    fp32          the reference
    bf16          precision=bf16 of Mythos: weights, sums and residual stream in fp32, inputs of products in bf16
    autocast      DeepSpeed's section torch_autocast over the same model
    bf16 weights  DeepSpeed's section bf16 with gradients accumulated and reduced in fp32, over the same model
    all bf16      the same without these two options, and with residual stream and state in bf16, too

    python -m benchmarks.precision [fast]
"""

import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.spawn import RankPool
from tests.tiny import EXPERTS, tiny_config

FORMS = ("fp32", "bf16", "bf16 weights", "autocast", "all bf16")
DEPTHS = (4, 8, 16)
STAGES = (3, 2, 1)
STEPS = 50
BATCH, LENGTH, VOCABULARY, WIDTH = 2, 64, 256, 128
SECTIONS: dict[str, dict[str, Any]] = {
    "autocast": {
        "torch_autocast": {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Linear", "deepspeed.moe.ep_experts.GroupedExperts"],
        }
    },
    "bf16 weights": {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    },
    "all bf16": {"bf16": {"enabled": True}},
}


def configuration(form: str, stage: int, experts: bool, depth: int) -> Any:
    """The run of one measurement."""
    moe = {"model__core_experts": EXPERTS | {"experts": 8, "expert_hidden_size": 96, "shared_hidden_size": 96}}
    return tiny_config(
        "looped",
        Path("unused"),
        Path("unused"),
        ranks=2,
        model__width=WIDTH,
        model__core_layers=1,
        model__vocabulary_size=VOCABULARY,
        model__attention={"kind": "gqa", "heads": 4, "kv_heads": 4, "head_size": 32},
        model__feed_forward={"kind": "swiglu", "hidden_size": 384},
        loop__mean_depth=depth,
        loop__depth="fixed",
        loop__backprop_depth=depth,
        loop__recompute=False,
        train__steps=STEPS,
        train__global_batch_sequences=4 * BATCH,
        train__micro_batch_sequences=BATCH,
        optim__learning_rate=2e-3,
        optim__warmup_steps=10,
        parallel__zero_stage=stage,
        data__sequence_length=LENGTH,
        precision="bf16" if form == "bf16" else "fp32",
        **(moe | {"parallel__expert_parallel_size": 2} if experts else {}),
    )


def measure(form: str, stage: int, experts: bool, depth: int, steps: int) -> dict[str, Any]:
    """One training run on one rank of two."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from mythos.engine import engine as engines
    from mythos.model import depth as depths
    from mythos.plan.schedule import schedule

    config = configuration(form, stage, experts, depth)
    with pytest.MonkeyPatch.context() as patch:
        change(form, patch)
        before = storages()
        engine = engines.TrainingEngine(config, torch.device("cpu"))
        plan = depths.fixed(depth, BATCH)
        losses, seconds, gradients, kept = [], [], {}, 0
        for step in range(steps):
            start = time.perf_counter()
            total = 0.0
            for micro_step in range(2):
                rows = tokens(step, micro_step, dist.get_rank())
                with Kept() as saved:
                    loss = engine(rows[:, :-1], rows[:, 1:], plan)
                engine.backward(loss.total)
                total += loss.cross_entropy.item() / 2
                kept = saved.bytes
            if step == 0:
                gradients = {
                    name: safe_get_full_grad(parameter).float().numpy().copy()
                    for name, parameter in engine.module.named_parameters()
                }
            applied = engine.step(schedule(config.optim, step, STEPS)).applied
            assert applied
            seconds.append(time.perf_counter() - start)
            mean = torch.tensor([total])
            dist.all_reduce(mean)
            losses.append(mean.item() / 2)
        state = sum(size for address, size in storages().items() if address not in before)
        engine.deepspeed.destroy()
    return {
        "losses": losses,
        "gradients": gradients if dist.get_rank() == 0 else {},
        "seconds": float(np.median(seconds)),
        "kept": kept,
        "state": state,
    }


def change(form: str, patch: pytest.MonkeyPatch) -> None:
    """Give the engine of Mythos the form's section, and a start from which every weight has a gradient."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from mythos.engine import engine as engines
    from mythos.model import build_model, precision

    def build(config: Any, sections: Any, device: Any) -> Any:
        model = build_model(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(0, 0.03, generator=generator)
        for module in model.modules():
            if form == "bf16 weights" and isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, inputs, output: output.float())
            if form == "autocast" and type(module) is precision.Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]
        if form == "all bf16":
            model.prelude_norm.__class__ = precision.RMSNorm
        return model

    def product(self: Any, x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def sections(*options: Any) -> Any:
        found = own(*options) | SECTIONS.get(form, {})
        found["zero_optimization"] |= {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
        return found

    own = engines.deepspeed_config
    patch.setattr(engines, "_build_model", build)
    patch.setattr(engines, "deepspeed_config", sections)
    if form in ("bf16 weights", "all bf16"):
        patch.setattr(engines, "training_dtype", lambda *options: torch.bfloat16)
    if form in SECTIONS:
        patch.setattr(engines.TrainingEngine, "_gather_in_training_type", lambda engine: None)
    patch.setattr(precision.FP32Linear, "forward", product)


def tokens(step: int, micro_step: int, rank: int) -> Any:
    """Rows of a random walk with a preferred step, which a model can learn."""
    import torch

    generator = np.random.default_rng((step, micro_step, rank))
    moves = np.where(generator.random((BATCH, LENGTH + 1)) < 0.7, 7, generator.integers(0, 20, (BATCH, LENGTH + 1)))
    return torch.from_numpy(moves.cumsum(axis=1) % VOCABULARY)


class Kept:
    """Counts the bytes that the forward pass keeps for the backward pass, without the weights."""

    def __enter__(self) -> "Kept":
        import torch

        self.found: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Any) -> Any:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.found.values())


def storages() -> dict[int, int]:
    """Addresses and bytes of the memory of all tensors in this process."""
    import torch

    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def relative(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """The error of all gradients together."""
    error = sum(float(np.square(found[name] - exact[name], dtype=np.float64).sum()) for name in exact)
    return (error / sum(float(np.square(exact[name], dtype=np.float64).sum()) for name in exact)) ** 0.5


def main(fast: bool) -> None:
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    for form in FORMS:
        pool = RankPool(2)
        for experts in (False, True):
            for stage in STAGES:
                for depth in DEPTHS:
                    steps = STEPS if stage == 3 and (depth == 8 or not experts) and not fast else 1
                    try:
                        found = pool.run(measure, form, stage, experts, depth, steps, timeout_s=1200)[0]
                    except AssertionError as error:
                        print(f"{form:<13} ZeRO-{stage} {'experts' if experts else 'dense':<8} T {depth:>2}  ", end="")
                        print(str(error).strip().splitlines()[-1][:100], flush=True)
                        continue
                    results[form, experts, stage, depth] = found
                    report(form, experts, stage, depth, found, results["fp32", experts, stage, depth])
        pool.close()


def report(form: str, experts: bool, stage: int, depth: int, found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Print one line of the table."""
    losses, reference = np.array(found["losses"]), np.array(exact["losses"])
    distance = np.abs(losses - reference) / reference
    print(
        f"{form:<13} ZeRO-{stage} {'experts' if experts else 'dense':<8} T {depth:>2}  "
        f"loss {distance[0]:.1e}  gradient {relative(found['gradients'], exact['gradients']):.2e}  "
        f"{len(losses):>2} steps: mean {distance.mean():.1e} largest {distance.max():.1e} last {losses[-1]:.3f}  "
        f"kept {found['kept'] / 2**20:5.1f} MiB  state {found['state'] / 2**20:5.1f} MiB  {found['seconds']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    main("fast" in sys.argv[1:])
