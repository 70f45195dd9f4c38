"""How every plot and sheet looks: one palette, one figure width, letters that stand being halved.

Colors: the palette of Okabe and Ito ("Color Universal Design", 2008), which people with any of the usual color
deficiencies can tell apart on white. Where colors repeat, dashes differ; what matters has a shape or a name besides.

Sizes: a figure is at most WIDTH inches wide, 1650 pixels. A README column shows it at half of that; its smallest
letters (POINTS) are then 9 pixels high. Letters on sheets of pictures are LETTERS pixels high for the same reason.
matplotlib is imported where it is used.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.drawing.fonts import drawable, has_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY)  # without yellow, which is hard to see on white
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # solid, dashed, dotted, dash-dotted
STRONG, QUIET = "#000000", "#6B6B6B"  # the one line that matters; the others, and what is not decided
SEQUENTIAL = "Blues"  # from few to many; its lightness falls all the way

DPI = 150  # pixels per inch
WIDTH = 11.0  # inches
POINTS = 9  # size of the smallest letters
FEW = 30  # values: a line of no more has points
LETTERS = 18  # pixels: height of letters on sheets of pictures
NAME_LENGTH = 32  # letters of a row's name beside an axis
TITLE_LENGTH = 20  # letters of a line above a panel, of which WIDTH has four side by side

SETTINGS: dict[str, Any] = {
    "font.size": POINTS,
    "axes.titlesize": POINTS + 1,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": POINTS,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "legend.frameon": False,
    "figure.titlesize": POINTS + 3,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "axes.edgecolor": QUIET,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}


def is_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of width x height inches in this style, written to `path` at the end.

    There is no window and no global state of pyplot, and the settings of the user's matplotlibrc do not count.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        set_fonts(figure)
        figure.savefig(path)


def set_fonts(figure: "Figure") -> None:
    """Give each text a font that has its characters (fonts.drawable), and `$` no special meaning."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        shown, font = drawable_lines(text.get_text())
        if shown != text.get_text():
            text.set_text(shown)
        if font != default_font():
            text.set_fontproperties(FontProperties(fname=font, size=text.get_fontsize()))


def drawable_lines(text: str) -> tuple[str, str]:
    """fonts.drawable of a text that may have several lines; one line where no font has all of them."""
    lines = [drawable(line, default=default_font()) for line in text.split("\n")]
    font = next((font for _, font in lines if font != default_font()), default_font())
    shown = [line for line, _ in lines]
    return ("\n".join(shown), font) if has_all(font, "".join(shown)) else drawable(text, default=default_font())


def plot_names(names: Sequence[str]) -> list[str]:
    """Names that matplotlib can draw: with numbers if a name has characters that no installed font has."""
    return [drawable(name, number, default=default_font())[0] for number, name in enumerate(names)]


@functools.lru_cache(maxsize=1)
def default_font() -> str:
    """The file of matplotlib's default font."""
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties())


def shorten(name: str) -> str:
    """A name that leaves room for the plot beside it."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def broken(title: str) -> str:
    """A title in lines of at most TITLE_LENGTH letters, which end after an underscore where they have one."""
    end = TITLE_LENGTH - 1
    return "\n".join(re.findall(rf".{{1,{TITLE_LENGTH}}}$|.{{1,{end}}}_|.{{1,{TITLE_LENGTH}}}", title))


def line_look(number: int) -> dict[str, Any]:
    """Color and dashes of line `number`: no two of the first 24 look alike."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number // len(PALETTE) % len(DASHES)]}


def marker_for(count: int) -> str | None:
    """Points on a line of few values: one value alone has no line."""
    return "o" if count <= FEW else None


def count_epochs(axis: "Axes") -> None:
    """Label the horizontal axis "epoch", in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.set_xlabel("epoch")
