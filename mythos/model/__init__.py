"""The model, which does not know about ranks, process groups, environment variables or DeepSpeed."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from mythos.config.model_schema import Dense, Looped
from mythos.config.schema import Config
from mythos.model.cache import Cache
from mythos.model.depth import DepthPlan
from mythos.model.init import Draw, initial_draws, initialise
from mythos.model.rules import Start
from mythos.model.transformer import DenseTransformer, LoopedTransformer, Model
from mythos.model.transformer import new_cache as new_cache

Forward = Callable[[Tensor, Tensor | None, DepthPlan | None], Any]
"""(tokens (B, S), targets (B, S) or None, plan) -> ``Losses``, or logits (B, S, V) without targets."""


class CachedForward(Protocol):
    """The same, or with a cache the logits after the last token of each sequence, (B, V)."""

    def __call__(
        self, tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None, cache: Cache | None = None, /
    ) -> Any:
        """The forward pass."""


def build_model(config: Config) -> Model:
    """The model of the configuration with its initial weights, on the CPU in fp32."""
    model = build_structure(config)
    initialise(model, start(config), config.seed)
    return model


def start(config: Config) -> Start:
    """What the initial weights of the configuration depend on besides the seed."""
    return Start(config.init, config.model.width, config.loop.mean_depth if config.loop else 1.0)


def draws(model: nn.Module, config: Config) -> dict[nn.Parameter, Draw]:
    """How to make the initial values of each parameter of the configuration's model."""
    return initial_draws(model, start(config), config.seed)


def build_structure(config: Config) -> Model:
    """The model of the configuration, before its parameters have their initial values."""
    match config.model:
        case Looped():
            assert config.loop is not None
            return LoopedTransformer(config.model, config.loop, config.train.z_loss)
        case Dense():
            return DenseTransformer(config.model, config.train.z_loss)
