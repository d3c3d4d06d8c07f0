"""Text from a model, one token of each sequence after the other, with a cache of keys and values.

p = softmax(logits / temperature) over the top_k likeliest tokens, and of these the fewest that make up top_p
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mythos.model import new_cache
from mythos.model.cache import Cache
from mythos.run.console import Notices

Decode = Callable[[Tensor, Cache], Tensor]
"""(tokens (B, S), cache) -> logits after the last token of each sequence, (B, V)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. At temperature 0 it is the likeliest one; only ids below ``ids`` are considered."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ids: int | None = None

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """A token id. The same seed gives the same tokens on every device."""
        logits_V = logits_V[: self.ids].float().cpu()
        if self.temperature == 0:
            return int(logits_V.argmax())
        sorted_V, order = (logits_V / self.temperature).sort(descending=True, stable=True)
        shares_V = torch.softmax(sorted_V[: self.top_k], dim=-1)
        if self.top_p is not None:
            shares_V = shares_V[shares_V.cumsum(dim=-1) - shares_V < self.top_p]
        return int(order[torch.multinomial(shares_V, 1, generator=generator)])


def continuations(
    decode: Decode,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    cache: Cache,
    generators: Sequence[torch.Generator],
    end: int | None = None,
) -> Iterator[list[int | None]]:
    """The next token of each sequence, ``tokens`` times; None for a sequence that has ended.

    It stops when all have ended. Under expert parallelism all ranks call it together, without ``end``: then the number
    of forward passes does not depend on what is drawn.

    Args:
        cache: for these prompts and all but the last of their new tokens.
        end: the token that ends a sequence.
    """
    device, longest = cache.entries.device, max(map(len, prompts))
    inputs_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    ended = [False] * len(prompts)
    for _ in range(tokens):
        logits_BV = decode(inputs_BS, cache)
        drawn = [sampling.draw(*each) for each in zip(logits_BV, generators, strict=True)]
        yield [None if has_ended else token for token, has_ended in zip(drawn, ended, strict=True)]
        ended = [has_ended or token == end for token, has_ended in zip(drawn, ended, strict=True)]
        if all(ended):
            return
        inputs_BS = torch.tensor(drawn, device=device)[:, None]


def continuation(
    decode: Decode,
    model: nn.Module,
    prompt: list[int],
    tokens: int,
    sampling: Sampling,
    depth: int | None,
    seed: int,
    device: torch.device,
) -> list[int]:
    """A prompt and exactly ``tokens`` more, at ``depth`` loop steps (None for a dense model)."""
    notices, ids = Notices("generating text", tokens, "tokens"), list(prompt)
    cache = new_cache(model, [len(prompt)], len(prompt) + tokens - 1, depth, device)
    generators = [torch.Generator().manual_seed(seed)]
    for number, drawn in enumerate(continuations(decode, [prompt], tokens, sampling, cache, generators)):
        ids += [token for token in drawn if token is not None]
        notices.report(number)
    return ids


def prompt_ids(tokenizer: Tokenizer, bos: str, text: str) -> list[int]:
    """One ``bos`` and the ids of the text, as the documents of the data are encoded.

    The tokenizer's own post-processor, which may add a BOS as well, is left out.
    """
    tokenizer.encode_special_tokens = True  # "<|bos|>" in the text is seven characters
    return [tokenizer.token_to_id(bos), *tokenizer.encode(text, add_special_tokens=False).ids]
