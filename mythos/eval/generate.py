"""Text from a model, one token after the other, without a cache."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from mythos.config.schema import Eval, Sample
from mythos.data.open import read_tokenizer
from mythos.engine.engine import TrainingEngine
from mythos.eval.forward import Stopped, evaluation_forward
from mythos.model import Forward, depth
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import Notices


def sample_text(
    engine: TrainingEngine,
    tokenizer_file: Path,
    bos: str,
    sample: Sample,
    options: Eval,
    longest: int,
    loop_depth: int | None,
    seed: int,
    watchdog: Watchdog,
    stop: StopRequest,
) -> str | None:
    """The prompt and the model's continuation as text; None if a stop was requested meanwhile. Collective.

    The other arguments are those of ``sample_tokens``.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    ids_of_text = max(tokenizer.get_vocab().values()) + 1
    prompt = prompt_ids(tokenizer, bos, sample.prompt)
    forward = evaluation_forward(engine, options, watchdog, "generating a sample", stop)
    try:
        with engine.evaluation():
            ids = sample_tokens(
                forward,
                prompt,
                sample.tokens,
                sample.temperature,
                longest,
                loop_depth,
                seed,
                engine.device,
                ids_of_text,
            )
    except Stopped:
        return None
    return tokenizer.decode(ids)


def prompt_ids(tokenizer: Tokenizer, bos: str, text: str) -> list[int]:
    """One ``bos`` and the ids of the text, as the documents of the data are encoded.

    The tokenizer's own post-processor, which may add a BOS as well, is left out.
    """
    tokenizer.encode_special_tokens = True  # "<|bos|>" in the text is seven characters
    return [tokenizer.token_to_id(bos), *tokenizer.encode(text, add_special_tokens=False).ids]


def sample_tokens(
    forward: Forward,
    prompt: list[int],
    tokens: int,
    temperature: float,
    longest: int,
    loop_depth: int | None,
    seed: int,
    device: torch.device,
    ids_of_text: int | None = None,
) -> list[int]:
    """The prompt and ``tokens`` more, drawn from softmax(logits / temperature); the most likely at temperature 0.

    Under expert parallelism all ranks call it together, so the number of forward passes is fixed: no drawn token ends
    it early. The model sees the last ``longest`` tokens of the context.

    Args:
        loop_depth: loop steps of a looped model; None for a dense one.
        ids_of_text: only ids below it are drawn, and take part in the softmax; None: all of the model's.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = None if loop_depth is None else depth.fixed(loop_depth, 1)
    ids = list(prompt)
    notices = Notices("sample", tokens, "tokens")
    for number in range(tokens):
        notices.report(number)
        logits = forward(torch.tensor([ids[-longest:]], device=device), None, plan)
        last_V = logits[0, -1, :ids_of_text].float().cpu()
        if temperature == 0:
            ids.append(int(last_V.argmax()))
        else:
            ids.append(int(torch.multinomial(torch.softmax(last_V / temperature, dim=-1), 1, generator=generator)))
    return ids
