"""Figures that are drawn without a display. Matplotlib takes half a second to import, which other work saves."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 110


def new_figure(columns: int, rows: int = 1, width: float = 4.8, height: float = 3.8) -> "tuple[Figure, Any]":
    """A figure and its axes, (rows, columns), each ``width`` x ``height`` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=DOTS_PER_INCH)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_load(figure: "Figure", axis: Any, load_TE: np.ndarray, title: str) -> None:
    """A map of each expert's share of the choices at each loop step, times the experts: 1 everywhere if balanced."""
    steps, experts = load_TE.shape
    relative_TE = load_TE * experts
    image = axis.imshow(relative_TE, aspect="auto", vmin=0, vmax=max(2.0, relative_TE.max()), cmap="viridis")
    figure.colorbar(image, ax=axis, label="share times experts; 1: even")
    axis.set(xlabel="expert", ylabel="loop step", title=title)
    ticks = loop_step_ticks(steps)
    axis.set_yticks(ticks, ticks + 1)


def loop_step_ticks(steps: int) -> np.ndarray:
    """Rows of a map with one row for each loop step that get a label, at most 8."""
    return np.unique(np.linspace(0, steps - 1, 8).round().astype(int))


def png(figure: "Figure") -> bytes:
    """The picture as the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def pixels(figure: "Figure") -> np.ndarray:
    """The picture as (height, width, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
