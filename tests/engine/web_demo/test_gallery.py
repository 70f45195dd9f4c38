"""The demo's pictures: what is there, what is refused, and how two lie over each other."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.shapes import NAMES as SHAPES
from engine.web_demo import gallery
from errors import UserError
from structures import Detections


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def test_a_picture_is_shrunk_to_the_working_size():
    assert gallery.read_upload(jpeg(2560, 640)).pixels.shape == (320, 1280, 3)
    assert gallery.read_upload(jpeg(31, 7)).pixels.shape == (7, 31, 3)


def test_boxes_of_a_shrunk_picture_fit_its_file():
    picture = gallery.read_upload(jpeg(2561, 640))
    height, width = picture.pixels.shape[:2]
    found = Detections(torch.tensor([[0.0, 0.0, width, height]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(
        gallery.scaled(found, picture.pixels, picture.size).boxes_xyxy[0, 2:].tolist(), [2561.0, 640.0]
    )


def test_an_upload_is_at_most_so_many_bytes_and_pixels(monkeypatch):
    data = jpeg(40, 30)
    monkeypatch.setattr(gallery, "MAX_MEGAPIXELS", 0.0011)
    with pytest.raises(UserError, match="too large, 40 x 30"):
        gallery.read_upload(data)
    monkeypatch.setattr(gallery, "MAX_MEGABYTES", (len(data) - 1) / 2**20)
    with pytest.raises(UserError, match="MB, expected"):
        gallery.read_upload(data)


def test_the_built_in_pictures_differ_and_stay_the_same():
    pictures = {name: gallery.built_in_picture(name) for name in gallery.BUILT_IN}
    drawn = [p for name, p in pictures.items() if not name.startswith("photo")]
    assert all(p.shape == (160, 160, 3) for p in drawn) and len(drawn) == len(pictures) - 5
    assert all(p.dtype == np.uint8 for p in pictures.values())
    digests = {gallery.digest(p) for p in pictures.values()}
    assert len(digests) == len(pictures)
    assert digests == {gallery.digest(gallery.built_in_picture(name)) for name in gallery.BUILT_IN}
    assert pictures["shapes in the dark"].mean() < 0.7 * pictures["shapes"].mean()


def test_the_picture_that_shows_the_most_of_a_models_classes():
    for names, picture in (
        (("dog", "cat", "person", "sheep", "horse", "cow"), "photo: a pasture"),
        (("cat", "sheep"), "photo: a cat"),
        (SHAPES, "shapes under a warm lamp"),
        (("WBC", "RBC"), "shapes under a warm lamp"),
        ((), "shapes under a warm lamp"),
    ):
        assert gallery.fitting_picture(names) == picture


def test_a_digest_sees_the_shape_and_every_pixel():
    picture = gallery.built_in_picture("shapes")
    other = picture.copy()
    other[-1, -1, -1] ^= 1
    digests = {gallery.digest(p) for p in (picture, other, picture.reshape(80, 320, 3))}
    assert len(digests) == 3


def test_wipe_shows_the_first_left_of_the_line_and_the_second_right_of_it():
    red, blue = Image.new("RGB", (100, 20), "red"), Image.new("RGB", (100, 20), "blue")
    half = gallery.wipe(red, blue, 0.3)
    row = [half.getpixel((x, 10)) for x in range(100)]
    assert row[:28] == [(255, 0, 0)] * 28 and row[33:] == [(0, 0, 255)] * 67 and row[30] == (255, 255, 255)
    assert gallery.wipe(red, blue, 0.0) == blue and gallery.wipe(red, blue, 1.0) == red
    with pytest.raises(ValueError, match="expected equal ones"):
        gallery.wipe(red, Image.new("RGB", (99, 20)), 0.5)


def test_boxes_grow_with_the_picture_that_is_shown():
    picture = np.zeros((80, 160, 3), dtype=np.uint8)
    found = Detections(torch.tensor([[40.0, 40.0, 80.0, 60.0]]), torch.tensor([0.9]), torch.tensor([0]))
    view = np.asarray(gallery.shown_with(picture, found, ("a",)))
    assert view.shape == (480, 960, 3)
    xs = np.flatnonzero(view[250:350].any((0, 2)))  # below the label
    assert (xs.min(), xs.max() + 1) == (240, 480)


def test_labels_can_be_read_where_a_picture_is_400_pixels_wide():
    found = Detections(torch.tensor([[20.0, 60.0, 80.0, 140.0]]), torch.tensor([0.9]), torch.tensor([0]))
    view = np.asarray(gallery.shown_with(np.zeros((160, 160, 3), np.uint8), found, ("l",)))
    label = view[:360].any(-1).any(1)  # above the box
    assert label.sum() * 400 / gallery.SHOWN_SIDE >= 10


def test_what_is_handed_on_has_both_pictures_below_their_titles():
    red, blue = Image.new("RGB", (100, 20), "red"), Image.new("RGB", (100, 20), "blue")
    sheet = gallery.beside(red, blue, ("a", "a title far too long for its picture"))
    assert sheet.getpixel((5, 55)) == (255, 0, 0) and sheet.getpixel((205, 55)) == (0, 0, 255)
    assert sheet.getpixel((106, 20)) == (255, 255, 255)  # between the titles
    assert Image.open(io.BytesIO(gallery.as_jpeg(sheet))).size == sheet.size
