"""Texts that Pillow's font has no letters for: another font that is installed, or the number and codes, never boxes."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from engine.drawing import fonts
from engine.drawing.detections import draw_detections
from engine.drawing.heat_maps import grid
from structures import Detections

CAT, DOG, BIRD = "\u732b", "\u72ac", "\u9ce5"  # Chinese signs


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """No fonts but those in a folder; what was found before is forgotten, before and after."""
    caches = (fonts.find_font, fonts._fonts_for, fonts._installed)

    def forget():
        for cache in caches:
            cache.cache_clear()
        fonts._FIRST_OF.clear()
        fonts._REPORTED.clear()

    monkeypatch.setattr(fonts, "_folders", lambda: iter([tmp_path / "fonts"]))
    (tmp_path / "fonts").mkdir()
    forget()
    yield tmp_path / "fonts"
    forget()


def write_font(path, characters: str, width: int = 500) -> None:
    """A TrueType font in which the n-th character is a bar of height 100 n, and a missing one a square."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pen_class = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
    names = [".notdef", *(f"g{number}" for number in range(len(characters)))]
    glyphs = {}
    for number, name in enumerate(names):
        pen = pen_class(None)
        top = 100 * number if number else 700
        for step, point in enumerate([(50, 0), (50, top), (450, top), (450, 0)]):
            (pen.lineTo if step else pen.moveTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{number}" for number, c in enumerate(characters)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (width, 50) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def drawn(name: str) -> np.ndarray:
    found = Detections(torch.tensor([[40.0, 60.0, 260.0, 200.0]]), torch.tensor([0.9]), torch.tensor([0]))
    return np.asarray(draw_detections(np.full((240, 320, 3), 90, np.uint8), found, (name,)))


def test_a_name_gets_the_first_font_that_has_all_of_it(installed):
    write_font(installed / "aa Sans.ttf", CAT + DOG + BIRD)  # without digits: a score could not stand beside the name
    write_font(installed / "aaa Sans.ttf", CAT + fonts.BESIDE)
    write_font(installed / "bbb Sans.ttf", CAT + DOG + fonts.BESIDE)
    write_font(installed / "ccc Bold.ttf", CAT + DOG + fonts.BESIDE)
    assert fonts.drawable(CAT, 3) == (CAT, str(installed / "aaa Sans.ttf"))
    assert fonts.drawable(CAT + DOG, 3) == (CAT + DOG, str(installed / "bbb Sans.ttf"))
    assert fonts.drawable("cat", 3) == ("cat", fonts.OWN)  # Pillow's own font comes first
    assert fonts.drawable(CAT + BIRD, 3) == (r"3 \u732b\u9ce5", fonts.OWN)


def test_a_name_is_drawn_with_its_own_signs_where_a_font_has_them(installed):
    write_font(installed / "signs.ttf", CAT + DOG + " " + fonts.BESIDE)
    assert not np.array_equal(drawn(CAT), drawn(DOG))
    font = ImageFont.truetype(installed / "signs.ttf", 9)
    assert font.getlength(f"{CAT} 0.90") == 9 * 0.5 * 6  # six characters of half a square
    label = (drawn(CAT) != 90).any(-1)[:60].any(0)  # the label above the box
    assert 28 <= label.sum() <= 32


def test_without_a_font_the_number_and_codes_are_drawn_and_one_line_says_why(installed, capsys):
    assert not np.array_equal(drawn(CAT), drawn(DOG))
    np.testing.assert_array_equal(drawn(CAT), drawn(r"0 \u732b"))
    assert fonts.drawable(f"red {CAT}", 7) == (r"7 red \u732b", fonts.OWN)
    assert fonts.drawable(f"red {CAT}") == (r"red \u732b", fonts.OWN)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and repr(CAT) in printed and "Noto Sans CJK" in printed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("café", "cafe"),  # Pillow's font has no accents
        ("ǻ", "a"),
        ("two\nlines\tand tabs", "two lines and tabs"),
        ("zero\x00", r"5 zero\x00"),
        ("half\ud83d", r"5 half\ud83d"),
        ("joined\u200d\ufe0f", "joined"),
        ("\U0001f600", r"5 \U0001f600"),
        ("", ""),
        (" ", " "),
    ],
)
def test_odd_names(installed, name, expected):
    text, path = fonts.drawable(name, 5)
    assert (text, path) == (expected, fonts.OWN)
    drawn(name)


def test_a_damaged_font_and_one_of_boxes_alone_are_passed_over(installed):
    (installed / "a.ttf").write_bytes(b"no font")
    write_font(installed / "LastResort-Regular.ttf", CAT)
    assert fonts.drawable(CAT, 1) == (r"1 \u732b", fonts.OWN)


def test_other_scripts_are_drawn_with_a_font_of_matplotlib(monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("Кошка", "γάτα", "☃"):
        text, path = fonts.drawable(name, 0)
        assert text == name and path != fonts.OWN and fonts.has_all(path, name)
    assert not np.array_equal(drawn("Кошка"), drawn("Совка"))


def test_titles_of_maps(installed):
    square = [Image.new("RGB", (64, 64))]
    a, b = (np.asarray(grid({name: square}, name)) for name in (CAT, DOG))
    assert not np.array_equal(a, b)


def test_plots_have_no_missing_glyphs(installed, tmp_path):
    pytest.importorskip("matplotlib")
    from engine.drawing.style import figure_file, plot_names

    write_font(installed / "signs.ttf", CAT + DOG + " " + fonts.BESIDE)
    names = plot_names([CAT, "Кошка", f"{CAT}{BIRD}", "$a$ $b", "half\ud83d"])
    assert names == [CAT, "Кошка", r"2 \u732b\u9ce5", "$a$ $b", r"4 half\ud83d"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with figure_file(tmp_path / "plot.png", 4, 4) as figure:
            axis = figure.subplots()
            axis.plot([1, 2], label=f"{names[0]} 0.5")
            axis.set_xticks(range(5), names)
            axis.set_yticks(range(5), names)
            axis.set_title(BIRD, loc="center")  # as a text that no list of names covers
            axis.legend()
    fonts_used = [label.get_fontproperties().get_file() for label in axis.get_xticklabels()]
    assert str(fonts_used[0]).endswith("signs.ttf") and fonts_used[1] is None
    assert axis.get_title() == r"\u9ce5"
