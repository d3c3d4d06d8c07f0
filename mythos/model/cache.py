"""What attention needs of the tokens before, so that a new token costs one position: a cache of keys and values.

    entries (N, B, L, C)    of each token its keys and values, or its latent and the rotated key that all heads share

Each block of prelude and coda has one of the N slots, each block of the core one for every loop step: the state differs
from step to step, and so do its keys and values. The memory is allocated once, in blocks of ``CACHE_BLOCK_TOKENS``
tokens, of which attention reads those in use.

Sequences may differ in length. First all prompts come together, padded on the right, then one token of each at a time.
Token l is at place l; what a pad leaves there is masked until a token replaces it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos.config.model_schema import CACHE_BLOCK_TOKENS, Dense, Looped

Angles = tuple[Tensor, Tensor]


@dataclass
class Cache:
    """The cache of a batch of sequences; ``mythos.model.new_cache`` makes one.

    ``noise`` are the streams of the sequences' initial loop states; ``loop_steps_B`` the loop steps that the last token
    of each sequence took.
    """

    entries: Tensor
    prelude_slots: int
    core_slots: int
    """Of each loop step."""
    depth: int
    rotary: Angles
    prompts: tuple[int, ...]
    noise: list[torch.Generator]
    lengths_B: Tensor
    loop_steps_B: Tensor
    longest: int = 0

    @property
    def counts(self) -> Sequence[int]:
        """How many tokens of each sequence come next: a prompt, or one."""
        return self.prompts if self.longest == 0 else (1,) * len(self.prompts)

    def begin(self, length: int) -> "NewTokens":
        """The next ``length`` tokens of each sequence, pads included.

        Raises:
            ValueError: they are not the prompts, then one token at a time; or do not fit.
        """
        if length != max(self.counts):
            raise ValueError(f"{length} tokens: a cache takes the prompts, then one token of each sequence at a time")
        end, device = self.longest + length, self.entries.device
        if end > len(self.rotary[0]):
            raise ValueError(f"a cache of {len(self.rotary[0])} tokens cannot take token {end}")
        rows_B = torch.arange(len(self.prompts), device=device)
        places_BS = self.lengths_B[:, None] + torch.arange(length, device=device)
        if self.longest == 0:
            cos, sin = (angles_SC[:length] for angles_SC in self.rotary)
            return NewTokens(self, rows_B, places_BS, None, (cos, sin))
        sees_BSL = torch.arange(whole_blocks(end), device=device) <= places_BS[..., None]
        cos, sin = (angles_SC[places_BS][:, None] for angles_SC in self.rotary)
        return NewTokens(self, rows_B, places_BS, sees_BSL[:, None], (cos, sin))


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one forward pass: whose they are, their places, and which entries they see.

    ``rows_B`` are sequences of the cache. ``sees_B1SL`` is None for prompts, which see only themselves.
    """

    cache: Cache
    rows_B: Tensor
    places_BS: Tensor
    sees_B1SL: Tensor | None
    rotary: Angles

    def of(self, rows_b: Tensor) -> "NewTokens":
        """Those of some of the sequences, by their numbers here; not for prompts."""
        assert self.sees_B1SL is not None
        cos, sin = self.rotary
        return NewTokens(
            self.cache,
            self.rows_B[rows_b],
            self.places_BS[rows_b],
            self.sees_B1SL[rows_b],
            (cos[rows_b], sin[rows_b]),
        )

    def prelude(self) -> list["LayerCache"]:
        """Of the blocks before the loop; of all blocks of a dense model."""
        return self._layers(0, self.cache.prelude_slots)

    def core(self, step: int) -> list["LayerCache"]:
        """Of the core's blocks at a loop step, from 0."""
        first = self.cache.prelude_slots + step * self.cache.core_slots
        return self._layers(first, first + self.cache.core_slots)

    def coda(self) -> list["LayerCache"]:
        """Of the blocks after the loop."""
        return self._layers(self._core.stop, len(self.cache.entries))

    def leave_loop(self, steps: int) -> None:
        """The tokens, one of each sequence, leave the loop after ``steps`` steps.

        For the steps that they leave out they get the entries of the last one: where the state hardly changes any more,
        its keys and values hardly do.
        """
        self.cache.loop_steps_B[self.rows_B] = steps
        by_step = self.cache.entries[self._core].unflatten(0, (self.cache.depth, self.cache.core_slots))
        rows_B, places_B = self.rows_B, self.places_BS[:, 0]
        by_step[steps:, :, rows_B, places_B] = by_step[steps - 1][:, rows_B, places_B]

    def finish(self, x_BSD: Tensor) -> Tensor:
        """All blocks have the tokens; returns the last one of each sequence, (B, D)."""
        counts_B = torch.tensor(self.cache.counts, device=x_BSD.device)
        self.cache.lengths_B += counts_B
        self.cache.longest += x_BSD.shape[1]
        return x_BSD[self.rows_B, counts_B - 1]

    @property
    def _core(self) -> slice:
        first = self.cache.prelude_slots
        return slice(first, first + self.cache.depth * self.cache.core_slots)

    def _layers(self, first: int, end: int) -> list["LayerCache"]:
        return [LayerCache(entries_BLC, self) for entries_BLC in self.cache.entries[first:end]]


@dataclass(frozen=True)
class LayerCache:
    """One slot of a cache, and the tokens that are added to it."""

    entries_BLC: Tensor
    new: NewTokens

    def add(self, entries_BSC: Tensor) -> Tensor:
        """Keep the entries of the new tokens; returns those that the new tokens may see, (B, L, C)."""
        new = self.new
        if new.sees_B1SL is None:
            self.entries_BLC[:, : entries_BSC.shape[1]] = entries_BSC
            return entries_BSC
        self.entries_BLC[new.rows_B[:, None], new.places_BS] = entries_BSC.type_as(self.entries_BLC)
        in_use_BLC = self.entries_BLC[:, : new.sees_B1SL.shape[-1]]
        return in_use_BLC if len(new.rows_B) == len(in_use_BLC) else in_use_BLC[new.rows_B]


def allocate(
    config: Looped | Dense,
    channels: int,
    rotary: Angles,
    depth: int,
    prompts: Sequence[int],
    seeds: Sequence[int],
    dtype: torch.dtype,
) -> Cache:
    """An empty cache.

    Args:
        channels: numbers of a token and layer.
        rotary: the angles of all places that may be used: as many as tokens fit.
        depth: loop steps; 0 for a dense model.
        prompts: how long each sequence's prompt is.
        seeds: of the sequences' initial loop states.
    """
    length, device = len(rotary[0]), rotary[0].device
    first, core, last = (
        (config.layers, 0, 0)
        if isinstance(config, Dense)
        else (config.prelude_layers, config.core_layers, config.coda_layers)
    )
    shape = (first + core * depth + last, len(prompts), whole_blocks(length), channels)
    return Cache(
        torch.zeros(shape, dtype=dtype, device=device),
        first,
        core,
        depth,
        rotary,
        tuple(prompts),
        [torch.Generator(device).manual_seed(seed) for seed in seeds],
        torch.zeros(len(prompts), dtype=torch.long, device=device),
        torch.full((len(prompts),), depth, device=device),
    )


def whole_blocks(tokens: int) -> int:
    """Tokens of the blocks that so many tokens need."""
    return -(-tokens // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS
