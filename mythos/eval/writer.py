"""A trained model in one process that continues texts, each as if it were alone: the work of `mythos generate`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from torch import Tensor
from typing_extensions import TypedDict

from mythos.checkpoint.trained import Trained, on_device
from mythos.config.derive import text_ids, whole_mean_depth
from mythos.data.format import TOKENIZER_FILE
from mythos.data.open import read_tokenizer
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.eval.forward import exit_rule
from mythos.eval.generate import Sampling, continuations, prompt_ids
from mythos.files import open_regular
from mythos.model import Model, new_cache
from mythos.model.cache import Cache
from mythos.model.depth import state_seed
from mythos.model.loop import ExitRule
from mythos.readers import LINE_BYTES, parse_json
from mythos.run.paths import bos_of_data


class _Prompt(TypedDict):
    """A line of a file of prompts."""

    prompt: str


_PROMPT = TypeAdapter(_Prompt)


@dataclass
class Written:
    """What a model has written after a prompt.

    ``loop_steps`` are those of all new tokens but the first, which the complete loop over the prompt gives.
    """

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    loop_steps: list[int] = field(default_factory=list)

    def text(self, tokenizer: Tokenizer) -> str:
        """The text of the new tokens, without those that stand for no text."""
        before: str = tokenizer.decode(self.prompt)
        return tokenizer.decode(self.prompt + self.ids)[len(before) :]


@dataclass(frozen=True)
class Writer:
    """A model and how it writes.

    ``longest`` is the length of its inputs in training, ``depth`` the number of loop steps (None for a dense model),
    ``end`` the token that ends a text.
    """

    model: Model
    tokenizer: Tokenizer
    bos: str
    longest: int
    depth: int | None
    rule: ExitRule | None
    sampling: Sampling
    end: int | None
    device: torch.device

    def write(self, prompts: Sequence[str], tokens: int, seed: int, first: int = 0) -> Iterator[list[Written]]:
        """An iterator over what is written so far, after each new token of the prompts.

        Args:
            first: number of the first prompt: each has a random stream of its own.

        Raises:
            UserError: a text would be longer than the model's inputs in training.
        """
        texts = [Written(prompt_ids(self.tokenizer, self.bos, prompt)) for prompt in prompts]
        lengths = [len(text.prompt) for text in texts]
        if (inputs := max(lengths) + tokens - 1) > self.longest:
            most = self.longest + 1 - max(lengths)
            raise UserError(
                f"--tokens {tokens}: after a prompt of {max(lengths)} tokens, longer than the {self.longest} inputs of "
                f"training (data.sequence_length): {f'give at most {most}' if most > 0 else 'shorten the prompt'}"
            )
        return self._continued(texts, tokens, inputs, seed, first)

    def _continued(
        self, texts: list[Written], tokens: int, inputs: int, seed: int, first: int
    ) -> Iterator[list[Written]]:
        lengths = [len(text.prompt) for text in texts]
        cache = new_cache(self.model, lengths, inputs, self.depth, self.device)
        generators = [torch.Generator().manual_seed(state_seed(seed, first + row)) for row in range(len(texts))]
        given = [text.prompt for text in texts]
        for drawn in continuations(self._decode, given, tokens, self.sampling, cache, generators, self.end):
            for text, token, loop_steps in zip(texts, drawn, cache.loop_steps_B.tolist(), strict=True):
                if token is not None:
                    if text.ids:
                        text.loop_steps.append(loop_steps)
                    text.ids.append(token)
                    text.ended = token == self.end
            yield texts

    @torch.no_grad()
    def _decode(self, tokens_BS: Tensor, cache: Cache) -> Tensor:
        rule: Any = self.rule  # a dense model has none
        logits_BV: Tensor = self.model(tokens_BS, None, None, rule, cache=cache)
        return logits_BV


def open_writer(
    trained: Trained, sampling: Sampling, depth: int | None, bos: str | None, end: str | None, ignore_end: bool
) -> Writer:
    """A trained model on its device.

    Args:
        depth: loop steps; None for the mean depth of training.
        bos: the token that begins each text; None for that of the data.
        end: the token that ends a text; None for the one that begins the next one.

    Raises:
        UserError: the tokenizer cannot be read or has no such token, or the model has no loop.
    """
    config = trained.config
    if depth is not None and config.loop is None:
        raise UserError(f"--depth {depth}: this model has no loop: leave it out")
    device = on_device(trained.model, config)
    tokenizer = read_tokenizer(trained.directory / TOKENIZER_FILE)
    bos = bos or bos_of_data(config, trained.directory)
    for option, token in (("--bos", bos), ("--end", end)):
        if token is not None and tokenizer.token_to_id(token) is None:
            raise UserError(f"{option} {token}: not in {trained.directory / TOKENIZER_FILE}: name one of its tokens")
    ids = min(text_ids(config.model), max(tokenizer.get_vocab().values()) + 1)
    return Writer(
        trained.model,
        tokenizer,
        bos,
        config.data.sequence_length,
        depth or whole_mean_depth(config),
        exit_rule(config.eval),
        Sampling(sampling.temperature, sampling.top_k, sampling.top_p, ids),
        None if ignore_end else tokenizer.token_to_id(end or bos),
        device,
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines. Raises UserError."""
    found, remedy = [], 'give lines such as {"prompt": "My fellow citizens"}'
    with os_errors_as_user_errors(path, remedy), open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
            if line.strip():
                found.append(parse_json(f"{path}: line {number}", line, _PROMPT, remedy)["prompt"])
    if not found:
        raise UserError(f"{path}: no prompts: {remedy}")
    return found
