"""The palette for people with color deficiencies, by a published simulation, and looks of lines that do not repeat."""

import itertools

import numpy as np
import pytest

from engine.drawing.detections import class_color
from engine.drawing.style import DASHES, FEW, PALETTE, QUIET, STRONG, line_look, marker_for, shorten

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1.0, of linear RGB
SEEN_WITH = {
    "full color vision": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)  # sRGB, white D65


def linear(color: str) -> np.ndarray:
    rgb = np.frombuffer(bytes.fromhex(color[1:]), np.uint8) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB -> CIELAB, in which a distance of about 2.3 can just be seen."""
    ratio = TO_XYZ @ rgb / TO_XYZ.sum(1)
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", SEEN_WITH)
def test_the_palette_is_told_apart(vision):
    seen = {color: lab((SEEN_WITH[vision] @ linear(color)).clip(0, 1)) for color in (*PALETTE, STRONG)}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)


def test_the_simulation_knows_red_from_green_in_full_color_alone():
    def distance(vision):
        seen = [lab((SEEN_WITH[vision] @ linear(color)).clip(0, 1)) for color in ("#C05050", "#6A8A30")]
        return np.linalg.norm(seen[0] - seen[1])

    assert distance("deuteranopia") < 15 < 60 < distance("full color vision")


def test_colors_stand_out_on_white():
    for color in (*PALETTE, QUIET, STRONG):
        assert 1.05 / (TO_XYZ[1] @ linear(color) + 0.05) > (4.5 if color in (QUIET, STRONG) else 2), color


def test_lines_do_not_look_alike():
    looks = [tuple(line_look(number).values()) for number in range(len(PALETTE) * len(DASHES))]
    assert len(set(looks)) == len(looks) == 24 and looks[0] == tuple(line_look(24).values())


def test_few_values_have_points():
    assert marker_for(1) and marker_for(FEW) and not marker_for(FEW + 1)


def test_the_first_classes_have_the_colors_of_the_palette():
    assert ["#{:02X}{:02X}{:02X}".format(*class_color(label)) for label in range(len(PALETTE))] == list(PALETTE)


def test_long_names_are_shortened():
    assert shorten("cwd+soft_class") == "cwd+soft_class" and len(shorten(40 * "a")) == 32
