"""lm-evaluation-harness, of the extra `eval`: a model of this project as one of its models, and its tasks.

Each text begins with one BOS. A context that does not fit is cut on the left; a continuation that does not fit, and a
text for its perplexity, is scored in windows (``mythos.eval.requests.windows``).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from mythos.errors import UserError
from mythos.eval.requests import Prompt, Scorer, Writer, in_parts, windows
from mythos.readers import one_line

GENERATED_AT_ONCE = 16
"""Tokens between two looks for the end of a text."""
DEFAULT_TOKENS = 256
"""Of a generated text, as in lm-evaluation-harness."""


class MythosLM(TemplateLM):
    """A model at one depth.

    Args:
        bos: the token that begins each text; where the model writes it, the text has ended.
        longest: of the model's inputs.
    """

    def __init__(self, scorer: Scorer, writer: Writer, tokenizer: Tokenizer, bos: str, longest: int) -> None:
        super().__init__()
        self._scorer, self._writer = scorer, writer
        self._encoder, self._bos, self._bos_id = tokenizer, bos, tokenizer.token_to_id(bos)
        self._encoder.encode_special_tokens = True  # BOS inside a text is text
        self.max_length = longest

    @property
    def eot_token_id(self) -> int:
        """Also the token before a text without a context."""
        return self._bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with one BOS before them unless ``add_special_tokens`` is False."""
        ids: list[int] = self._encoder.encode(string.removeprefix(self._bos), add_special_tokens=False).ids
        return ids if add_special_tokens is False else [self._bos_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy decoding gives it; 0 and True for an empty one."""
        return self._loglikelihood_tokens([(request.args, *self._pair(*request.args)) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, each token of which is predicted once."""
        encoded = [(request.args, [self._bos_id], self.tok_encode(request.args[0], False)) for request in requests]
        totals = [total for total, _ in self._sums(encoded)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop texts, a BOS or ``max_gen_toks``."""
        texts = []
        for request in requests:
            context, options = request.args
            texts.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._sums(requests)
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _sums(self, encoded: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        parts = [windows([*before, *after], len(before), self.max_length) for _, before, after in encoded]
        requests = [one for those in parts for one in those]
        scores = iter([score for part in in_parts(requests) for score in self._scorer(part)])
        found = []
        for those in parts:
            own = [next(scores) for _ in those]
            total = math.fsum(value for each in own for value in each.log_probabilities.tolist())
            found.append((total, all(each.is_greedy for each in own)))
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return [self._bos_id], self.tok_encode(continuation, False)
        before, after = self._encode_pair(context, continuation)
        if not after:  # the continuation is empty, or part of the context's last token
            after = self.tok_encode(continuation, False)
        return before, after

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = min(int(options.get("max_gen_toks", DEFAULT_TOKENS)), self.max_length - 1)
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        ids = self.tok_encode(context)[-(self.max_length - tokens) :]
        begin, text = len(ids), ""
        while len(ids) - begin < tokens:
            ids = self._writer(Prompt(ids, min(GENERATED_AT_ONCE, begin + tokens - len(ids)), temperature))
            written = ids[begin:]
            ended = self._bos_id in written
            text = self._encoder.decode(written[: written.index(self._bos_id)] if ended else written)
            if ended or any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@cache
def known_tasks() -> TaskManager:
    """All tasks of lm-evaluation-harness, whose thousands of files take seconds to read."""
    return TaskManager()


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for a name that no task, group or tag has."""
    for name in names:
        if not name.endswith(".yaml") and not known_tasks().match_tasks([name]):
            raise UserError(f"--tasks {name}: no task of lm-evaluation-harness: `lm_eval ls tasks` lists them")


def run_tasks(model: MythosLM, names: Sequence[str], limit: int | None) -> dict[str, dict[str, float]]:
    """The metrics of tasks of lm-evaluation-harness, by task. A name may be the path of a task's YAML file.

    Raises:
        UserError: a task cannot be read, or its data.
    """
    try:
        found = simple_evaluate(model, tasks=list(names), limit=limit, log_samples=False, task_manager=known_tasks())
    except (OSError, ValueError, KeyError, TypeError) as error:  # data that is not there, a damaged YAML file
        reason = one_line(f"{type(error).__name__}: {error}")
        remedy = "check the task, or give it a local copy of its data"
        raise UserError(f"--tasks {','.join(names)}: {reason}: {remedy}") from error
    assert found is not None
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float) and "," in name}
        for task, metrics in found["results"].items()
    }
