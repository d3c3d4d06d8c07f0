"""The models of ``mythos.model`` as transformers calls them.

The loop's first state is the noise of seed 0 for every sequence, as where tasks are evaluated: the logits of a sequence
depend neither on its batch nor on the call.
"""

from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mythos.config.init_schema import Init
from mythos.config.loop_schema import Loop as LoopOptions
from mythos.config.model_schema import Dense, Looped
from mythos.export.configuration_mythos import MythosConfig
from mythos.loss import IGNORED
from mythos.model.cache import Cache as LoopCache
from mythos.model.depth import fixed
from mythos.model.init import initial_draws
from mythos.model.rules import Start
from mythos.model.transformer import DenseTransformer, LoopedTransformer, new_cache


class GenerationCache(Cache):
    """The cache of one ``generate``: made for the prompts when they come, then filled with one token at a time.

    It is one of transformers' caches by its type only: those have no place for the entries of several loop steps.
    ``tokens``: how many each sequence may have, pads included.
    """

    is_compileable = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.cache: LoopCache | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens it has."""
        return self.cache.longest if self.cache else 0

    def reorder_cache(self, beams: Tensor) -> None:
        """The sequences that a beam search continues; all beams of a prompt are equally long."""
        assert self.cache is not None
        self.cache.entries = self.cache.entries[:, beams]


class MythosForCausalLM(PreTrainedModel, GenerationMixin):
    """A looped or a standard transformer.

    ``forward`` and ``generate`` take ``depth``, the number of loop steps; without it ``config.depth`` is used. Batches
    may be padded on either side, if ``attention_mask`` says where. With ``labels``, ``loss`` is the cross-entropy of
    the next tokens, without the penalties of training.
    """

    config_class = MythosConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - transformers 4 reads the keys
    _no_split_modules = ["Loop", "Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MythosConfig) -> None:
        super().__init__(config)
        model = _section(Looped | Dense, config.model)
        self.model: LoopedTransformer | DenseTransformer
        if isinstance(model, Looped):
            self.model = LoopedTransformer(model, _section(LoopOptions, config.loop), 0.0)
        else:
            self.model = DenseTransformer(model, 0.0)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose weights are the token table."""
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        depth: int | None = None,
        past_key_values: GenerationCache | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The logits (B, S, V), and the loss if ``labels`` (B, S) are given, which are not shifted; -100 is ignored.

        Args:
            attention_mask: (B, S), 0 where a token is padding.
            past_key_values: the cache of ``generate``; then the logits are those after each last token, (B, 1, V).
            options: of transformers' loss, and options of other models, which have no effect here.
        """
        order_BS = None
        if attention_mask is not None and not attention_mask.all():
            # Tokens first, in their order: a causal model does not see what follows them.
            order_BS = (attention_mask == 0).long().argsort(dim=1, stable=True)
            input_ids = input_ids.gather(1, order_BS)
            if labels is not None:
                labels = labels.masked_fill(attention_mask == 0, IGNORED).gather(1, order_BS)
        if past_key_values is not None:
            logits_B1V = self._cached_logits(input_ids, attention_mask, depth, past_key_values)[:, None]
            return CausalLMOutputWithPast(logits=logits_B1V, past_key_values=past_key_values)
        logits_BSV = self._logits(input_ids, depth)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, self.config.vocab_size, **options)
        if order_BS is not None:
            logits_BSV = logits_BSV.gather(1, order_BS.argsort(dim=1)[..., None].expand_as(logits_BSV))
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BSV)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        depth: int | None = None,
        past_key_values: GenerationCache | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The arguments of ``forward`` for the next token: the prompts or, if the cache has them, the last token."""
        if past_key_values is not None and past_key_values.cache is not None:
            input_ids, attention_mask = input_ids[:, -1:], None
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "depth": depth,
            "past_key_values": past_key_values,
        }

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any) -> None:
        """Called by ``generate``; the last of the others that all versions give is the largest length."""
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = GenerationCache(others[2])

    def _cached_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, depth: int | None, past: GenerationCache
    ) -> Tensor:
        if past.cache is None:
            batch, length = input_ids.shape
            lengths = [length] * batch if attention_mask is None else attention_mask.sum(dim=1).tolist()
            input_ids = input_ids[:, : max(lengths)]
            past.cache = new_cache(self.model, lengths, past.tokens, self._loop_steps(depth), input_ids.device)
        return self.model(input_ids, cache=past.cache)

    def _logits(self, input_ids: Tensor, depth: int | None) -> Tensor:
        steps, batch = self._loop_steps(depth), len(input_ids)
        return self.model(input_ids, depth=None if steps is None else fixed(steps, batch, [0] * batch))

    def _loop_steps(self, depth: int | None) -> int | None:
        if depth is not None and isinstance(self.model, DenseTransformer):
            raise ValueError(f"depth={depth}: this model has no loop: leave out depth")
        return self.config.depth if depth is None else depth

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        loop, model = self.config.loop, self.model
        start = Start(Init(**self.config.init), model.config.width, loop["mean_depth"] if loop else 1.0)
        draws = initial_draws(model, start, 0)
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
                continue  # loaded, or about to be tied
            parameter.copy_(draws[parameter](parameter.shape, parameter.device))


def _section(annotation: Any, value: Any) -> Any:
    """The section of the configuration that ``value`` is the tree of, chosen by its ``kind``; other values as given."""
    sections = [kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)]
    if not sections or not isinstance(value, dict):
        return value
    for section in sections:
        types = get_type_hints(section)
        if "kind" not in types or value["kind"] in get_args(types["kind"]):
            return section(**{name: _section(types[name], part) for name, part in value.items()})  # type: ignore[operator]
    raise ValueError(f"kind {value['kind']!r}: this version has no such part of a model")
