"""Parameters of a model, by part, from the configuration alone."""

from collections import Counter
from dataclasses import dataclass

from mythos.config.derive import text_ids
from mythos.config.model_schema import Dense, Looped
from mythos.plan.tensors import parameters

TABLES = ("token table", "value tables")
PADDING = "padding of tables"
NOT_MATRICES = ("value tables", "norms")
"""Parts that are no factors of matrix products."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. ``idle`` are those of routed experts that a token does not go to."""

    parts: dict[str, int]
    idle: int

    @property
    def total(self) -> int:
        """All parameters; the tied output matrix is the token table and counts once."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses when every layer runs once; lookup tables count with all their rows."""
        return self.total - self.idle

    @property
    def matrices(self) -> int:
        """Parameters that are factors of matrix products: all but lookup tables and norms, and with the tied head."""
        return self.total - sum(self.parts.get(part, 0) for part in NOT_MATRICES)

    @property
    def tables(self) -> int:
        """Parameters in tables that are looked up by token, with their padding."""
        return sum(self.parts.get(part, 0) for part in (*TABLES, PADDING))


def count_parameters(model: Looped | Dense) -> ParameterCount:
    """Count every parameter of the model; the rows of tables beyond the tokenizer's ids as their padding."""
    parts: Counter[str] = Counter()
    padding_rows = model.vocabulary_size - text_ids(model)
    for parameter in parameters(model):
        padding = padding_rows * parameter.shape[1] if parameter.part in TABLES else 0
        parts[parameter.part] += parameter.size - padding
        parts[PADDING] += padding
    parts = +parts
    experts = model.core_experts if isinstance(model, Looped) else None
    idle = 0
    if experts is not None:
        idle = parts["routed experts"] // experts.experts * (experts.experts - experts.experts_per_token)
    return ParameterCount(dict(parts), idle)
