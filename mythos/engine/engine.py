"""Configuration -> engine, with one interface for every ZeRO stage."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups
from torch import Tensor, nn

from mythos.config.derive import expert_parallel_size
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.engine.compiled_code import remove_unfinished
from mythos.engine.exchange import Exchange
from mythos.engine.experts import adapt_layers
from mythos.engine.initial import draw_by_ranks
from mythos.engine.muon import MuonAdamW
from mythos.engine.optimizer import build_optimizer
from mythos.engine.placement import (
    GlobalParameter,
    ParameterShard,
    muon_placements,
    parameter_shards,
    refresh_weights,
)
from mythos.engine.sections import compiles, deepspeed_config, expert_parallel_section, precision, training_dtype
from mythos.model import LoopedTransformer, Model, build_structure, draws
from mythos.model.block import Block
from mythos.model.cache import Cache
from mythos.model.compilation import compile_blocks
from mythos.model.depth import DepthPlan
from mythos.model.loop import ExitRule, Loop
from mythos.model.moe import TOKENS_PER_EXPERT, MoE
from mythos.model.parameters import Role, parameter_roles, stacked_matrices
from mythos.model.precision import FP32Linear
from mythos.ranks.fit import device_of_each_rank, recomputes_on
from mythos.ranks.group import hosts
from mythos.run.console import log


class Update(NamedTuple):
    """The result of one optimizer step, which is the same on every rank."""

    applied: bool
    gradient_norm: float


class TrainingEngine:
    """A model under DeepSpeed: ZeRO 0-3, expert parallelism, accumulation, clipping, skipped bad steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        _silence_deepspeed(device)
        self.device = device
        self.stage = config.parallel.zero_stage
        ranks = hosts()
        self.expert_parallel_size = expert_parallel_size(config, ranks)
        self.clip = config.optim.gradient_clip
        self.precision = precision(config, device)
        self.dtype = training_dtype(config, device)
        sections = deepspeed_config(config, dist.get_world_size(), device)
        model = _build_model(config, sections, device)
        model.product_type = self.dtype
        if isinstance(model, LoopedTransformer):
            model.loop.recompute = recomputes_on(config, ranks, device_of_each_rank(device))
        moe_names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
        # Before initialisation: marked later, the children would keep their gathering hooks, which cannot be compiled.
        deepspeed.utils.set_z3_leaf_modules(model, [Loop, Block])
        optimizer = build_optimizer(model, config.optim)
        if moe_names:
            assert isinstance(config.model, Looped)
            assert config.model.core_experts is not None
            size = self.expert_parallel_size
            log.info(f"each set of experts is distributed over {size} rank{'s' if size > 1 else ''}")
            # ZeRO 1 and 2 find the experts' process group by these marks.
            optimizer.param_groups[-1] |= {"moe": True, "name": f"ep_size_{size}"}
            sections["expert_parallel"] = expert_parallel_section(config.model.core_experts, size, moe_names, device)
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:  # of DeepSpeed; the tests of Mythos cover its own
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        self.optimizer = optimizer
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=sections)
        adapt_layers(self.module, moe_names, device)
        self._gather_in_training_type()
        if compiles(config, device):
            for path in remove_unfinished():
                log.warning(f"{path}: left unfinished by a process that was killed: removed, to be compiled again")
            compile_blocks(self.module)
        if isinstance(optimizer, MuonAdamW):
            optimizer.exchanges = self._exchanges(optimizer)

    @property
    def module(self) -> nn.Module:
        """The model, with its experts in AutoEP's form."""
        return self.deepspeed.module

    def __call__(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        depth: DepthPlan | int | None = None,
        exit_rule: ExitRule | None = None,
        count: float | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The model's forward pass: logits, or ``Losses`` when there are targets."""
        return self.deepspeed(tokens_BS, targets_BS, depth, exit_rule, count, cache)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro batch.

        A non-finite loss always results in non-finite gradients, so that the one check in ``step`` detects both.
        """
        self.deepspeed.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro batch

    def step(self, hyperparameters: Mapping[str, Mapping[str, float]]) -> Update:
        """After the last micro batch: clip and update, or skip the update if the gradient norm is not finite.

        ``hyperparameters`` are those of ``mythos.plan.schedule.schedule``, by parameter group.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group |= hyperparameters[group["role"]]
        if self.stage == 0:
            norm = self._clip_plain_gradients()
            self.deepspeed.step()
            return Update(math.isfinite(norm), norm)
        self.deepspeed.step()
        return Update(self.deepspeed.was_step_applied(), float(self.deepspeed.get_global_grad_norm()))

    def close(self) -> None:
        """Free the memory of weights, gradients and optimizer state; the engine cannot be used any more.

        The objects stay for the life of the process: DeepSpeed's hooks on gradients refer to them, out of the reach of
        the garbage collector.
        """
        FWD_MODULE_STACK.clear()
        for optimizer in {self.optimizer, self.deepspeed.optimizer}:
            vars(optimizer).clear()
        for parameter in self.module.parameters():
            parameter.grad = None
            for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
                tensor.data = tensor.data.new_empty(0)
            vars(parameter).clear()  # at stages 1 and 2 fragments of the optimizer state

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train()

    def shards(self) -> Iterator[ParameterShard]:
        """The fp32 weights and the optimizer state on this rank, parameter by parameter."""
        by_id = {id(parameter): _global(name, parameter) for name, parameter in self.module.named_parameters()}
        stacked = stacked_matrices(self.module)
        return parameter_shards(self.deepspeed.optimizer, self.optimizer, self.stage, stacked, lambda p: by_id[id(p)])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, including the experts of all ranks."""
        return {name: _global(name, parameter).shape for name, parameter in self.module.named_parameters()}

    def refresh_weights(self) -> None:
        """Copy the weights into the model after the ``shards`` were loaded from a checkpoint. Collective."""
        refresh_weights(self.deepspeed.optimizer, self.stage)

    def buffers(self) -> dict[str, Tensor]:
        """The model's state besides its parameters, such as the experts' balance biases; the same on all ranks."""
        return {
            f"{prefix}.{name}": buffer
            for prefix, module in self.module.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set and name != TOKENS_PER_EXPERT
        }

    def set_buffers(self, saved: Mapping[str, Tensor]) -> None:
        """Restore saved buffers. Raises KeyError or RuntimeError if one is missing or has another shape."""
        for name, buffer in self.buffers().items():
            buffer.copy_(saved[name].view(buffer.shape))

    def _clip_plain_gradients(self) -> float:
        """Return the global gradient norm; scale gradients down to the clip, or drop them if it is not finite.

        At stage 0 DeepSpeed runs the optimizer itself: it reports no norm and does not skip bad steps.
        """
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        squared = torch.zeros((), device=self.device)
        squared_of_experts: dict[str, Tensor] = {}
        for parameter in parameters:
            own = parameter.grad.float().square().sum()  # type: ignore[union-attr]
            if getattr(parameter, "allreduce", True):
                squared = squared + own
            else:  # this rank's experts: the other ranks of the expert-parallel group have others
                name = parameter.group_name  # type: ignore[attr-defined]
                squared_of_experts[name] = squared_of_experts.get(name, torch.zeros_like(squared)) + own
        for name, of_experts in squared_of_experts.items():
            dist.all_reduce(of_experts, group=groups._get_expert_parallel_group(name))
            squared = squared + of_experts
        norm = squared.sqrt().item()
        for parameter in parameters:
            if not math.isfinite(norm):
                parameter.grad = None
            elif self.clip and norm > self.clip:
                parameter.grad.mul_(self.clip / (norm + 1e-6))  # type: ignore[union-attr]
        return norm

    def _exchanges(self, optimizer: MuonAdamW) -> dict[Tensor, Exchange]:
        """For each tensor that DeepSpeed passes to Muon: how the matrices in it are orthogonalised. Collective."""
        replicas = {"": dist.group.WORLD}
        if self.stage == 0:
            names = [group["name"] for group in optimizer.param_groups if group.get("moe")]
            replicas |= {name: groups._get_expert_data_parallel_group(name) for name in names}
        stacked = stacked_matrices(self.module)
        return {
            tensor: Exchange(slices, process_group, self.stage == 0, self.dtype, self.device)
            for tensor, process_group, slices in muon_placements(
                self.deepspeed.optimizer, optimizer, self.stage, replicas, stacked
            )
        }

    def _gather_in_training_type(self) -> None:
        """ZeRO-3 gathers the blocks' and experts' matrices in the type of their products, everything else in fp32.

        Gradients are still summed over the ranks in fp32. DeepSpeed's section ``torch_autocast`` sets the same mark,
        but then these gradients are summed in bf16, too.
        """
        in_fp32 = {module.weight for module in self.module.modules() if isinstance(module, FP32Linear)}
        for parameter, role in parameter_roles(self.module).items():
            of_block = role in (Role.BLOCK, Role.EXPERT) and parameter not in in_fp32
            if of_block and len(getattr(parameter, "ds_shape", parameter.shape)) >= 2:
                setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, self.dtype)


def _global(name: str, parameter: Any) -> GlobalParameter:
    """The global parameter to which a parameter of the engine's module belongs."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "allreduce", True):
        return GlobalParameter(name, shape, 0, dist.get_rank(), dist.get_world_size())
    group = parameter.group_name  # of experts: each rank of the group has shape[0] of them, in the order of ranks
    ranks, rank = groups._get_expert_parallel_world_size(group), groups._get_expert_parallel_rank(group)
    replicas = groups._get_expert_data_parallel_group(group)
    return GlobalParameter(
        name,
        (ranks * shape[0], *shape[1:]),
        rank * torch.Size(shape).numel(),
        dist.get_rank(replicas),
        dist.get_world_size(replicas),
    )


def _build_model(config: Config, sections: dict[str, Any], device: torch.device) -> Model:
    """The model with its initial weights; at stage 3 every rank keeps only its part of each parameter."""
    if config.parallel.zero_stage < 3:
        with device:
            model = build_structure(config)
        draw_by_ranks(draws(model, config), device)
        return model
    with deepspeed.zero.Init(config_dict_or_path=sections):
        model = build_structure(config)
    draw_by_ranks(
        draws(model, config),
        device,
        lambda parameter, rank: deepspeed.zero.GatheredParameters([parameter], modifier_rank=rank),
    )
    return model


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """AutoEP's remarks on its section do not: it is generated from the model, and ``adapt_layers`` checks."""
    return record.module != "auto_ep_config"


def _silence_deepspeed(device: torch.device) -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_concerns_the_user)
    # DeepSpeed calls torch's collectives by deprecated names; a user cannot do anything about these warnings.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory all-reduce at the first start: a minute, and it needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
