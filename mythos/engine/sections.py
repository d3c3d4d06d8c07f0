"""DeepSpeed's configuration from ours, without importing DeepSpeed."""

import importlib.util
import os
import re
import shutil
from typing import Any

import torch

from mythos.config.derive import micro_steps
from mythos.config.model_schema import MixtureOfExperts
from mythos.config.schema import Config
from mythos.errors import UserError


def precision(config: Config, device: torch.device) -> str:
    """The type of matrix products: fp32 or bf16."""
    if config.precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return config.precision


def training_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of matrix products in training."""
    return torch.bfloat16 if precision(config, device) == "bf16" else torch.float32


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled. Raises UserError where they should be and torch finds no compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)
    possible = compiler is not None and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)
    if config.compile == "blocks" and not possible:
        raise UserError("compile = blocks: this host has no g++ (or no triton for its GPU): install it or set off")
    return config.compile == "blocks" or (config.compile == "auto" and device.type == "cuda" and possible)


def deepspeed_config(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, without the section of the experts."""
    plain_optimizer = config.parallel.zero_stage == 0  # the engine clips, see its _clip_plain_gradients
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
        "gradient_accumulation_steps": micro_steps(config, world_size),
        "gradient_clipping": 0.0 if plain_optimizer else config.optim.gradient_clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": device.type == "cuda",
            "stage3_param_persistence_threshold": config.parallel.persistent_parameter_elements,
        },
    }
    return sections


def expert_parallel_section(
    experts: MixtureOfExperts, size: int, moe_names: list[str], device: torch.device
) -> dict[str, Any]:
    """AutoEP's section. It ignores misspelt keys, so the engine checks that every layer was converted."""
    return _expert_kernels(size, device) | {
        "enabled": True,
        "autoep_size": size,
        "moe_layer_pattern": "|".join(re.escape(name) for name in moe_names),
        "router_pattern": "router",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "top_k": experts.experts_per_token,
        "num_experts_attr": "experts",
        "has_shared_experts": True,
        "shared_experts_pattern": "shared_experts",
        "score_func": experts.scores,
        "score_apply": "post",
        "route_norm": experts.normalise,
        "route_scale": experts.route_scale,
        "num_expert_groups": experts.groups,
        "num_limited_groups": experts.groups_per_token,
    }


def _expert_kernels(size: int, device: torch.device) -> dict[str, Any]:
    """AutoEP's faster forms on NVIDIA GPUs: it refuses to start with one that the device does not support.

    fused_weighted_sum: the experts' outputs are weighted and summed in one Triton kernel, in fp32, instead of a scatter
        and an fp32 copy of all of them.
    fused: gate and up projections are one grouped product. torch has that kernel from compute capability 9.0 on; on
        older GPUs AutoEP uses a Triton kernel, which has only the separate form.
    async_split_plan: the host waits for the numbers of tokens to exchange while the GPU already packs them.
    """
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return {}
    grouped = torch.cuda.get_device_capability(device) >= (9, 0)
    return {
        "combine_impl": "fused_weighted_sum",
        "gate_up_impl": "fused" if grouped else "separate",
        "async_split_plan": size > 1,
    }
