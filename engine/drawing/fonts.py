"""Which font draws a text. Pillow's own font has Latin letters; others come from fonts that are installed.

A character that a font lacks is drawn as an empty box, and two such names look alike. So each text gets a font that has
all of its characters; where no font has them, accents are left out, or the characters are written as \\u escapes.
"""

import functools
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import ImageFont, features

OWN = ""  # in the place of a path: Pillow's own scalable font, which is the same on every machine
PROBE_SIZE = 24  # pixels: letters that differ do so at this size
BESIDE = ".0123456789lp"  # a score stands beside a name, and matplotlib measures the height of a line with l and p
ABSENT = "\U0010ffff"  # no character, so every font draws its sign for a missing one
LAST_RESORTS = ("lastresort", "adobeblank", "notdef")  # fonts that have a box for everything
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
    """The text, or what is drawn instead, and the path of the font that has it, `default` where that one does.

    Where no font here has all of its characters, the text is tried without accents; then `number` (a class id) comes
    first and each missing character is written as an escape. The first such text is reported on stderr in one line.
    """
    text = "".join(" " if c.isspace() else c for c in text if not _is_hidden(c))
    path = find_font(text, default)
    if path is not None:
        return text, path
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if plain.strip() and has_all(default, plain):
        return plain, default
    _report(text)
    escaped = "".join(c if has_all(default, c) else c.encode("unicode_escape").decode() for c in text)
    return (escaped if number is None else f"{number} {escaped}"), default


@functools.lru_cache(maxsize=4096)
def find_font(text: str, default: str = OWN) -> str | None:
    """The path of a font that has every character of the text, `default` first; None where there is no such font.

    A font other than the default also has the characters that are drawn beside names.
    """
    if not _can_lay_out(text):
        return None
    if has_all(default, text):
        return default
    lacking = next(c for c in text if not has_all(default, c))
    return next((path for path in _fonts_for(_script(lacking)) if has_all(path, text + BESIDE)), None)


def has_all(path: str, text: str) -> bool:
    """Whether a font has all characters of a text. Blanks count as there."""
    probe = _probe(path)
    return probe is not None and all(probe(character) for character in text)


@functools.lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.load_default(size) if path == OWN else ImageFont.truetype(path, size)


@functools.cache
def _probe(path: str) -> Callable[[str], bool] | None:
    """A function that tells whether the font has a character; None where it does not load."""
    try:
        font = load_font(path, PROBE_SIZE)
        absent = _picture(font, ABSENT)
    except (OSError, ValueError):  # a bitmap font of other sizes, a damaged file
        return None

    @functools.cache
    def has(character: str) -> bool:
        if character == " ":
            return True
        if unicodedata.category(character) in ("Cc", "Cs"):  # control characters and halves of pairs
            return False
        try:
            return _picture(font, character) != absent
        except (OSError, ValueError):
            return False

    return has


def _picture(font: ImageFont.FreeTypeFont, text: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(text)
    return mask.size, bytes(mask)


def _is_hidden(character: str) -> bool:
    """Joiners, marks of direction and selectors of a variant: they have no picture of their own."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _can_lay_out(text: str) -> bool:
    """Letters that join or run from right to left need Pillow's layout engine Raqm."""
    needs_raqm = any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c) == "Mc" for c in text)
    return not needs_raqm or features.check("raqm")


def _script(character: str) -> str:
    """The first character of its script that we met stands for all: fonts are searched once for each script."""
    return _FIRST_OF.setdefault(unicodedata.name(character, character).partition(" ")[0], character)


_FIRST_OF: dict[str, str] = {}


@functools.cache
def _fonts_for(character: str) -> tuple[str, ...]:
    return tuple(path for path in _installed() if has_all(path, character))


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Font files of this machine, plain sans-serif ones first; always in the same order."""

    def rank(path: Path) -> tuple:
        name = path.stem.lower().replace("-", "").replace("_", "").replace(" ", "")
        unlike = sum(word in name for word in UNLIKELY)
        return unlike, next((i for i, word in enumerate(LIKELY) if word in name), len(LIKELY)), name, str(path)

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
    matplotlib = importlib.util.find_spec("matplotlib")  # brings DejaVu Sans: Cyrillic, Greek, Arabic
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
