"""What every figure must satisfy, whatever it shows. The figure is kept for more questions after it is written."""

import contextlib

import numpy as np
from matplotlib.text import Text

from engine.drawing import style


class Kept:
    """Replaces style.figure_file in a module: `kept.figure` is the last figure that it wrote."""

    def __init__(self, monkeypatch, module):
        self.figure = None

        @contextlib.contextmanager
        def figure_file(path, width, height):
            with style.figure_file(path, width, height) as figure:
                yield figure
            self.figure = figure

        monkeypatch.setattr(module, "figure_file", figure_file)

    @property
    def axes(self):
        return self.figure.axes


def check(figure, *, max_width: float = style.WIDTH) -> None:
    """Nothing is empty, too small, outside the figure, or, if it was put into an axis, outside its frame."""
    assert figure.get_size_inches()[0] <= max_width + 0.01 and figure.axes
    renderer = figure.canvas.get_renderer()
    whole = figure.bbox.padded(1)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            assert text.get_fontsize() >= style.POINTS, text
            box = text.get_window_extent(renderer)
            is_tick_out_of_view = text in [t for a in figure.axes for t in a.get_xticklabels() + a.get_yticklabels()]
            assert is_tick_out_of_view or (whole.contains(*box.min) and whole.contains(*box.max)), text
    for axis in figure.axes:
        assert axis.lines or axis.images or axis.collections, "an empty panel"
        frame = axis.bbox.padded(1)
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        for box, text in zip(boxes, axis.texts):
            assert frame.contains(*box.min) and frame.contains(*box.max), text
        for number, box in enumerate(boxes):
            assert not any(overlap(box, other) for other in boxes[:number]), axis.texts[number]


def overlap(a, b) -> bool:
    """Whether two boxes share more than 2 pixels in both directions."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2


def legend_of(holder) -> list[str]:
    legend = holder.get_legend() if hasattr(holder, "get_legend") else holder.legends[0]
    return [text.get_text() for text in legend.get_texts()]


def as_rgb(color: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(color[1:]), np.uint8).astype(float) / 255
