"""The configuration of an exported model, as transformers reads it from config.json."""

from typing import Any

from transformers import PretrainedConfig


class MythosConfig(PretrainedConfig):
    """The sections ``model``, ``loop`` and ``init`` of the run's configuration, under the names of its options.

    ``depth`` is the number of loop steps where a call gives none: the mean depth of training. A dense model has no
    ``loop`` and no ``depth``. ``max_position_embeddings`` is the length of the rows that the model was trained on.
    """

    model_type = "mythos"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        loop: dict[str, Any] | None = None,
        init: dict[str, Any] | None = None,
        depth: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.loop, self.init, self.depth = model, loop, init, depth
        super().__init__(**kwargs)
