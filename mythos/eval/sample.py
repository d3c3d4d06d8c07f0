"""The text that a run writes at its end."""

from pathlib import Path

from mythos.config.schema import Eval, Sample
from mythos.data.open import read_tokenizer
from mythos.engine.engine import TrainingEngine
from mythos.eval.forward import Stopped, evaluation_forward
from mythos.eval.generate import Sampling, continuation, prompt_ids
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog


def sample_text(
    engine: TrainingEngine,
    tokenizer_file: Path,
    bos: str,
    sample: Sample,
    options: Eval,
    longest: int,
    depth: int | None,
    seed: int,
    watchdog: Watchdog,
    stop: StopRequest,
) -> str | None:
    """The prompt and the model's continuation as text; None if a stop was requested meanwhile. Collective.

    Of a prompt that is too long for ``longest`` inputs, the beginning is left out.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    bos_id, *prompt = prompt_ids(tokenizer, bos, sample.prompt)
    prompt = [bos_id, *prompt[max(0, len(prompt) - (longest - sample.tokens)) :]]
    sampling = Sampling(sample.temperature, ids=max(tokenizer.get_vocab().values()) + 1)
    forward = evaluation_forward(engine, options, watchdog, "generating a sample", stop)
    try:
        with engine.evaluation():
            ids = continuation(
                lambda tokens, cache: forward(tokens, None, None, cache),
                engine.module,
                prompt,
                sample.tokens,
                sampling,
                depth,
                seed,
                engine.device,
            )
    except Stopped:
        return None
    return tokenizer.decode(ids)
