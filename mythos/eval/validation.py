"""What a run does with its model besides training it: validation, and a sample of text."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mythos.config.derive import eval_depths
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.data.format import BOS
from mythos.data.open import read_tokenizer
from mythos.data.stream import Source
from mythos.engine.engine import TrainingEngine
from mythos.eval.exit import exit_rule
from mythos.eval.generate import sample_tokens
from mythos.eval.val_loss import validation_losses
from mythos.model import Forward
from mythos.model.depth import DepthPlan
from mythos.model.loop import ExitRule
from mythos.ranks import group
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log
from mythos.run.metrics import MetricsWriter


def validate(
    config: Config,
    engine: TrainingEngine,
    sources: Sequence[Source],
    step: int,
    writer: MetricsWriter | None,
    watchdog: Watchdog,
    stop: StopRequest | None = None,
) -> dict[str, float] | None:
    """Measure and report the validation loss at each depth. Collective.

    Returns:
        The losses; None when a rank was asked to stop meanwhile, and all have left.
    """
    forward = _forward(engine, exit_rule(config.eval), watchdog, f"validation after step {step}", stop)

    for source in sources:
        group.agree(partial(source.dataset.check, config.eval.sequences))
    try:
        with engine.evaluation():
            losses = validation_losses(
                forward,
                sources,
                eval_depths(config),
                config.eval.sequences,
                config.train.micro_batch_sequences,
                engine.device,
            )
    except _Stopped:
        return None
    log.info(f"step {step} " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    if writer:
        writer.write(step, losses)
    return losses


def sample_text(
    config: Config, engine: TrainingEngine, tokenizer_file: Path, watchdog: Watchdog, stop: StopRequest
) -> str | None:
    """The prompt and the model's continuation, as text; None when a rank was asked to stop meanwhile. Collective."""
    tokenizer = read_tokenizer(tokenizer_file)
    tokenizer.encode_special_tokens = True  # the prompt is text: "<|bos|>" in it is seven letters
    prompt = [tokenizer.token_to_id(BOS), *tokenizer.encode(config.sample.prompt).ids]
    deepest = max(eval_depths(config)) if isinstance(config.model, Looped) else None
    forward = _forward(engine, exit_rule(config.eval), watchdog, "writing a sample", stop)
    try:
        with engine.evaluation():
            ids = sample_tokens(
                forward,
                prompt,
                config.sample.tokens,
                config.sample.temperature,
                longest=config.data.sequence_length,
                loop_depth=deepest,
                seed=config.seed,
                device=engine.device,
            )
    except _Stopped:
        return None
    return tokenizer.decode(ids)


class _Stopped(Exception):
    """All ranks have agreed to leave what they were doing."""


def _forward(
    engine: TrainingEngine, rule: ExitRule | None, watchdog: Watchdog, doing: str, stop: StopRequest | None
) -> Forward:
    """A forward pass that tells the watchdog, and before which all ranks agree whether to stop."""

    def forward(tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None) -> tuple[Tensor, dict[str, Tensor]]:
        watchdog.progress(doing)
        if stop is not None and group.on_any_rank(stop.asked, engine.device):
            raise _Stopped
        return engine(tokens, targets, plan, rule)

    return forward
