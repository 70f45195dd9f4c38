"""Maps as pictures: what the colors and the heat must show, on maps whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.drawing.heat_maps import (
    BAR,
    LINE,
    TITLE_LINES,
    attention_heat,
    common_colors,
    grid,
    heat_colors,
    heat_legend,
    overlay,
    stack,
    text_legend,
    to_pictures,
    wrap,
)


def test_attention_is_the_mean_of_its_heads_from_its_least_to_its_most():
    attention = torch.full((2, 2, 2, 2), 0.25)
    attention[0, 0] = torch.tensor([[0.2, 0.4], [0.1, 0.3]])
    attention[0, 1] = torch.tensor([[0.1, 0.1], [0.0, 0.0]])
    heat = attention_heat(attention)
    torch.testing.assert_close(heat[0], torch.tensor([[0.5, 1.0], [0.0, 0.5]]))
    assert torch.equal(heat[1], torch.zeros(2, 2))  # the same everywhere


def test_heat_goes_from_black_over_red_and_yellow_to_white():
    heat = torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0]]])
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).float()
    torch.testing.assert_close(heat_colors(heat)[0, :, 0].T, expected)


def test_equal_directions_have_equal_colors():
    torch.manual_seed(0)
    t_map = torch.randn(2, 8, 3, 3)
    scale = torch.rand(2, 1, 3, 3) + 0.5
    same, other = common_colors(scale * t_map, t_map)
    torch.testing.assert_close(same, other)
    assert same.std() > 0.1
    same, other = common_colors(torch.randn(2, 8, 3, 3), t_map)
    assert (same - other).abs().max() > 0.1


def test_a_map_of_two_kinds_of_vectors_has_two_colors():
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    t_map = torch.stack([a, a, b, b], dim=1).view(1, 4, 1, 4)
    (colors,) = common_colors(t_map)
    left, right = colors[0, :, 0, :2], colors[0, :, 0, 2:]
    torch.testing.assert_close(left[:, 0], left[:, 1])
    assert abs(float(left[0, 0] - right[0, 0])) == pytest.approx(1)


def test_pictures_and_their_grid():
    colors = torch.zeros(2, 3, 2, 2)
    colors[0, 0, 0, 1], colors[1] = 1.0, 2.0  # above 1 is 1
    pictures = to_pictures(colors, 8)
    red = np.asarray(pictures[0])
    assert red[:4, 4:].tolist() == np.full((4, 4, 3), (255, 0, 0)).tolist() and not red[4:].any()
    assert np.asarray(pictures[1]).min() == 255
    sheet = grid({"a": pictures, "no room for it": pictures[:1]}, heading="two columns")
    top = LINE * (1 + TITLE_LINES)
    assert sheet.size == (2 * 12, top + 2 * 12)
    assert sheet.getpixel((5, top + 1)) == (255, 0, 0) and sheet.getpixel((1, top)) == (0, 0, 0)
    assert stack([sheet, grid({"b": pictures})]).size == (24, sheet.height + LINE + 24)


def test_titles_and_legends_are_cut_or_broken_at_their_width():
    lines, font = wrap("tokens of a_teacher_with_a_name_that_is_far_too_long", 200, TITLE_LINES)
    assert len(lines) == 2 and lines[0] == "tokens of" and lines[1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert wrap("short", 200, TITLE_LINES)[0] == ["short"] and wrap("", 200, 1)[0] == [""]
    text = "a sentence of quite a few words that needs more than one line"
    lines, font = wrap(text, 200, 20)
    assert " ".join(lines) == text and all(font.getlength(line) <= 200 for line in lines)
    assert text_legend(text, 200).height > len(lines) * LINE


def test_the_bar_of_heat_has_its_colors_from_low_to_high():
    sheet = np.asarray(heat_legend("attention", 500))
    row = sheet[LINE // 2].astype(int)
    colored = np.flatnonzero(np.ptp(row, axis=1) > 60)  # from dark red to pale yellow
    assert 0.7 * BAR < np.ptp(colored) < BAR and (np.diff(row[colored], axis=0) >= 0).all()
    assert sheet[:, : colored[0] - 30].min() < 100 and sheet[:, colored[-1] + 30 :].min() < 100  # low, high


def test_an_overlay_keeps_the_picture_in_grey():
    (blended,) = overlay([Image.new("RGB", (2, 2), (0, 0, 250))], [Image.new("RGB", (2, 2))], share=0.5)
    red, green, blue = blended.getpixel((0, 0))
    assert red == green == blue > 0
