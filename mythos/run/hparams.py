"""The dozen figures by which TensorBoard compares runs."""

from mythos.config.derive import tokens_per_step
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.plan.flops import expected_steps, training_flops
from mythos.plan.params import count_parameters


def hparams(config: Config) -> dict[str, float | str]:
    """Numbers as numbers; a dense model has depth 1 and no experts.

    ``FLOPs`` are those of the whole training at the expected depths.
    """
    model, count = config.model, count_parameters(config.model)
    tokens = tokens_per_step(config) * config.train.steps
    experts = model.core_experts if isinstance(model, Looped) else None
    per_token = training_flops(model, config.data.sequence_length, expected_steps(config.loop))
    return {
        "model": model.kind,
        "parameters": float(count.total),
        "active parameters": float(count.active),
        "matrix parameters": float(count.matrices),
        "width": float(model.width),
        "mean depth": float(config.loop.mean_depth) if config.loop else 1.0,
        "experts": float(experts.experts) if experts else 0.0,
        "tokens": float(tokens),
        "FLOPs": per_token * tokens,
        "tokens a step": float(tokens_per_step(config)),
        "optimizer": config.optim.kind,
        "learning rate": config.optim.learning_rate,
        "seed": float(config.seed),
    }
