"""Finds a font for a text. Pillow's own font has Latin letters; other letters need an installed font.

A font draws an empty box for a character it lacks, so that different names look the same. Each text therefore gets a
font with all of its characters. If there is none, accents are left out or characters are written as \\u escapes.
"""

import functools
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import ImageFont, features

OWN = ""  # used instead of a path: Pillow's own scalable font, the same on every machine
PROBE_SIZE = 24  # pixels: different letters look different at this size
BESIDE = ".0123456789lp"  # a score is drawn beside a name, and matplotlib measures the line height with l and p
ABSENT = "\U0010ffff"  # not a character, so every font draws its sign for a missing one
LAST_RESORTS = ("lastresort", "adobeblank", "notdef")  # fonts that draw a box for every character
LIKELY = (
    "cjk",
    "notosans",
    "wqy",
    "droidsansfallback",
    "yahei",
    "hei",
    "pingfang",
    "gothic",
    "meiryo",
    "malgun",
    "sans",
)
UNLIKELY = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif", "condensed")


def drawable(text: str, number: int | None = None, *, default: str = OWN) -> tuple[str, str]:
    """A text that can be drawn, and the path of the font for it: `default` if it has all characters.

    If no installed font has all characters, the text is drawn without accents. If that fails too, each missing
    character is written as an escape, after `number` (a class id). The first such text is reported on stderr.
    """
    text = "".join(" " if c.isspace() else c for c in text if not _is_hidden(c))
    path = find_font(text, default)
    if path is not None:
        return text, path
    unaccented = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if unaccented.strip() and has_all(default, unaccented):
        return unaccented, default
    _report(text)
    escaped = "".join(c if has_all(default, c) else c.encode("unicode_escape").decode() for c in text)
    return (escaped if number is None else f"{number} {escaped}"), default


@functools.lru_cache(maxsize=4096)
def find_font(text: str, default: str = OWN) -> str | None:
    """The path of a font that has every character of the text, `default` if possible; None if there is none.

    A font other than the default must also have the characters that are drawn beside names.
    """
    if not _can_lay_out(text):
        return None
    if has_all(default, text):
        return default
    lacking = next(c for c in text if not has_all(default, c))
    return next((path for path in _fonts_for(_script(lacking)) if has_all(path, text + BESIDE)), None)


def has_all(path: str, text: str) -> bool:
    """Whether a font has all characters of a text. Blanks count as present."""
    probe = _probe(path)
    return probe is not None and all(probe(character) for character in text)


@functools.lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    font = ImageFont.load_default(size) if path == OWN else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # load_default without a size gives a bitmap font
    return font


@functools.cache
def _probe(path: str) -> Callable[[str], bool] | None:
    """A function that returns whether the font has a character; None if the font cannot be loaded."""
    try:
        font = load_font(path, PROBE_SIZE)
        absent = _rasterize(font, ABSENT)
    except (OSError, ValueError):  # a bitmap font of other sizes, a damaged file
        return None

    @functools.cache
    def has(character: str) -> bool:
        if character == " ":
            return True
        if unicodedata.category(character) in ("Cc", "Cs"):  # control characters and halves of pairs
            return False
        try:
            return _rasterize(font, character) != absent
        except (OSError, ValueError):
            return False

    return has


def _rasterize(font: ImageFont.FreeTypeFont, text: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(text)
    return mask.size, bytes(mask)


def _is_hidden(character: str) -> bool:
    """Joiners, direction marks and variation selectors: characters without a shape of their own."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _can_lay_out(text: str) -> bool:
    """Whether Pillow can lay out the text: joined letters and right-to-left text need its layout engine Raqm."""
    needs_raqm = any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c) == "Mc" for c in text)
    return not needs_raqm or bool(features.check("raqm"))


def _script(character: str) -> str:
    """The first character met of this script: it stands for the script, so that fonts are searched once for each."""
    return _FIRST_OF.setdefault(unicodedata.name(character, character).partition(" ")[0], character)


_FIRST_OF: dict[str, str] = {}


@functools.cache
def _fonts_for(character: str) -> tuple[str, ...]:
    return tuple(path for path in _installed() if has_all(path, character))


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """The font files of this machine in a fixed order, plain sans-serif fonts first."""

    def rank(path: Path) -> tuple:
        name = path.stem.lower().replace("-", "").replace("_", "").replace(" ", "")
        unlikely = sum(word in name for word in UNLIKELY)
        return unlikely, next((i for i, word in enumerate(LIKELY) if word in name), len(LIKELY)), name, str(path)

    found = {path for folder in _folders() for path in _font_files(folder)}
    return tuple(str(path) for path in sorted(found, key=rank))


def _folders() -> Iterator[Path]:
    home, environment = Path(os.path.expanduser("~")), os.environ
    yield from (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts")
    yield from (Path(part) / "fonts" for part in environment.get("XDG_DATA_DIRS", "").split(":") if part)
    if "XDG_DATA_HOME" in environment:
        yield Path(environment["XDG_DATA_HOME"]) / "fonts"
    yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts")
    if "WINDIR" in environment:
        yield Path(environment["WINDIR"]) / "Fonts"
    if "LOCALAPPDATA" in environment:
        yield Path(environment["LOCALAPPDATA"]) / "Microsoft" / "Windows" / "Fonts"
    matplotlib = importlib.util.find_spec("matplotlib")  # contains DejaVu Sans: Cyrillic, Greek, Arabic
    if matplotlib is not None and matplotlib.origin:
        yield Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"


def _font_files(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            is_last_resort = any(name.lower().replace("-", "").startswith(word) for word in LAST_RESORTS)
            if name.lower().endswith((".ttf", ".ttc", ".otf", ".otc")) and not is_last_resort:
                yield Path(parent) / name


_REPORTED: list[str] = []


def _report(text: str) -> None:
    if not _REPORTED:
        _REPORTED.append(text)
        advice = "install one, such as Noto Sans CJK for Chinese, Japanese and Korean"
        reason = f"no font on this machine has all characters of {text!r}"
        print(f"{reason}: its number and codes are drawn instead ({advice})", file=sys.stderr, flush=True)
