"""The pictures of a validation in TensorBoard: loss against depth, and where the tokens of each loop step go."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mythos.config.derive import whole_mean_depth
from mythos.config.schema import Config
from mythos.drawing import draw_load, new_figure
from mythos.eval.validation import Validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_DEPTH = re.compile(r"val/loss_depth_(\d+)")


def validation_pictures(config: Config, found: Validation) -> "Iterator[tuple[str, Figure]]":
    """Each with its name; a dense model has none."""
    by_depth = {int(match[1]): loss for name, loss in found.losses.items() if (match := OF_DEPTH.fullmatch(name))}
    if len(by_depth) > 1:
        figure, ((axis,),) = new_figure(1)
        depths = sorted(by_depth)
        axis.plot(depths, [by_depth[steps] for steps in depths], marker="o")
        axis.axvline(whole_mean_depth(config), color="0.5", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, [str(steps) for steps in depths])
        axis.set(xlabel="loop steps (dashed: mean depth of training)", ylabel="nats per token", title="Validation loss")
        yield "val/loss_by_depth", figure
    if found.load_LTE is not None:
        figure, axes = new_figure(len(found.load_LTE))
        for layer, load_TE in enumerate(found.load_LTE):
            name = f", core layer {layer}" if len(found.load_LTE) > 1 else ""
            draw_load(figure, axes[0, layer], load_TE, f"Load{name}")
        yield "val/expert_load", figure
