"""What a run does with its model besides training it: validation, and a sample of text."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mythos.config.derive import eval_depths
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.data.format import BOS
from mythos.data.stream import Source
from mythos.eval.exit import exit_rule
from mythos.eval.val_loss import validation_losses
from mythos.generate import sample_tokens
from mythos.metrics.console import log
from mythos.metrics.writer import MetricsWriter
from mythos.model.depth import DepthPlan
from mythos.train import distributed
from mythos.train.data import read_tokenizer
from mythos.train.engine import TrainingEngine
from mythos.train.watchdog import Watchdog


def validate(
    config: Config,
    engine: TrainingEngine,
    sources: Sequence[Source],
    step: int,
    writer: MetricsWriter | None,
    watchdog: Watchdog,
) -> dict[str, float]:
    """Measure and report the validation loss at each depth. Collective."""
    rule = exit_rule(config.eval)

    def forward(tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None) -> tuple[Tensor, dict[str, Tensor]]:
        watchdog.progress(f"validation after step {step}")
        return engine(tokens, targets, plan, rule)

    for source in sources:
        distributed.agree(partial(source.dataset.check, config.eval.sequences))
    with engine.evaluation():
        losses = validation_losses(
            forward,
            sources,
            eval_depths(config),
            config.eval.sequences,
            config.train.micro_batch_sequences,
            engine.device,
        )
    log.info(f"step {step} " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    if writer:
        writer.write(step, losses)
    return losses


def sample_text(config: Config, engine: TrainingEngine, tokenizer_file: Path, watchdog: Watchdog) -> str:
    """The prompt and the model's continuation, as text. Collective."""
    tokenizer = read_tokenizer(tokenizer_file)
    tokenizer.encode_special_tokens = True  # the prompt is text: "<|bos|>" in it is seven letters
    prompt = [tokenizer.token_to_id(BOS), *tokenizer.encode(config.sample.prompt).ids]
    deepest = max(eval_depths(config)) if isinstance(config.model, Looped) else None
    rule = exit_rule(config.eval)

    def forward(tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None) -> tuple[Tensor, dict[str, Tensor]]:
        watchdog.progress("writing a sample")
        return engine(tokens, targets, plan, rule)

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
    return tokenizer.decode(ids)
