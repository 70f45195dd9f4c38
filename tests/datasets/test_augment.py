"""Boxes must follow pixels: an independent float64 reference, solid boxes drawn and found again, and identities."""

import colorsys
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from config import AugmentConfig
from datasets import augment as A
from datasets.augment import Parameters, augment
from errors import UserError
from structures import Targets

NOTHING = AugmentConfig(
    mosaic=0.0, mixup=0.0, scale=0.0, translate=0.0, flip_horizontal=0.0, hue=0.0, saturation=0.0, value=0.0
)
EVERYTHING = AugmentConfig(mosaic=0.7, mixup=0.5, degrees=20.0, shear=8.0, flip_vertical=0.5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def targets_of(boxes, image, labels=None, ignore=None):
    count = len(image)
    return Targets(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels if labels is not None else [0] * count, dtype=torch.int64),
        torch.tensor(image, dtype=torch.int64),
        torch.tensor(ignore if ignore is not None else [False] * count, dtype=torch.bool),
    )


COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])


def scene(count=6, size=96, seed=0):
    """Grey pictures with one box each, of a pure colour of its own; box edges on whole pixels."""
    rng = np.random.default_rng(seed)
    images = torch.full((count, 3, size, size), 114, dtype=torch.uint8)
    boxes = []
    for i in range(count):
        w, h = rng.integers(24, 60, 2)
        x, y = rng.integers(0, size - w), rng.integers(0, size - h)
        images[i, :, y : y + h, x : x + w] = 255 * COLOURS[i, :, None, None].to(torch.uint8)
        boxes.append([x, y, x + w, y + h])
    return images, targets_of(boxes, list(range(count)), labels=list(range(count)))


def is_coloured(image, label) -> np.ndarray:
    """(S, S) bool: the pixels at least half covered by the box of this colour, on grey."""
    grey = 114 / 255
    is_on = COLOURS[label].bool()[:, None, None]
    return torch.where(is_on, image > (1 + grey) / 2, image < grey / 2).all(0).numpy()


def find_box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)


# ---------------------------------------------------------------- independent reference


def reference_matrix(p: Parameters, b: int, size: int) -> np.ndarray:
    """Canvas -> view, as a product of elementary matrices in the order of the steps; the origin is the middle."""
    angle, zoom = float(p.rotation[b]), float(p.zoom[b])
    rotate = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    scale = np.diag([zoom, zoom, 1.0])
    shear = np.array([[1, math.tan(p.shear[b, 0]), 0], [math.tan(p.shear[b, 1]), 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, float(p.shift[b, 0]) * size], [0, 1, float(p.shift[b, 1]) * size], [0, 0, 1]])
    to_corner = np.array([[1, 0, size / 2], [0, 1, size / 2], [0, 0, 1]])
    flip = np.eye(3)
    if p.flip[b, 0]:
        flip = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]]) @ flip
    if p.flip[b, 1]:
        flip = np.array([[1, 0, 0], [0, -1, size], [0, 0, 1]]) @ flip
    return flip @ to_corner @ shift @ shear @ scale @ rotate


def reference_pixel(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear value of (3, S, S) at continuous x, y; every pixel outside is grey."""
    size = picture.shape[1]

    def at(row, column):
        inside = 0 <= row < size and 0 <= column < size
        return picture[:, row, column] if inside else np.full(3, 114 / 255)

    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    a, b = x - 0.5 - left, y - 0.5 - top
    return (
        (1 - a) * (1 - b) * at(top, left)
        + a * (1 - b) * at(top, left + 1)
        + (1 - a) * b * at(top + 1, left)
        + a * b * at(top + 1, left + 1)
    )


def reference_places(p: Parameters, b: int, content: np.ndarray, size: int):
    """For view b: (source row, canvas position of its pixel 0, 0, the quadrant as a predicate of canvas x, y)."""
    if not p.use_mosaic[b]:
        return [(int(p.neighbours[b, 0]), np.array([-size / 2, -size / 2]), lambda x, y: True)]
    joint = p.joint[b].numpy() * size
    places = []
    for quadrant, source in enumerate(p.neighbours[b].tolist()):
        right, below = quadrant % 2 == 1, quadrant >= 2
        x1, y1, x2, y2 = content[source]
        touching = np.array([x1 if right else x2, y1 if below else y2])
        is_here = lambda x, y, r=right, d=below: (x >= joint[0]) == r and (y >= joint[1]) == d
        places.append((source, joint - touching, is_here))
    return places


def reference_view(pictures: np.ndarray, p: Parameters, b: int, content: np.ndarray) -> np.ndarray:
    size = pictures.shape[-1]
    inverse = np.linalg.inv(reference_matrix(p, b, size))
    places = reference_places(p, b, content, size)
    view = np.empty((3, size, size))
    for i in range(size):
        for j in range(size):
            x, y, _ = inverse @ (j + 0.5, i + 0.5, 1)
            source, offset, _ = next(place for place in places if place[2](x, y))
            view[:, i, j] = reference_pixel(pictures[source], x - offset[0], y - offset[1])
    return view


def reference_boxes(targets: Targets, p: Parameters, b: int, content: np.ndarray, size: int) -> list[tuple]:
    """(label, clipped box) of view b, by the rules in the docstrings."""
    matrix, rows = reference_matrix(p, b, size), []
    for source, offset, _ in reference_places(p, b, content, size):
        for n in range(len(targets)):
            if int(targets.image[n]) != source:
                continue
            x1, y1, x2, y2 = targets.boxes_xyxy[n].double().numpy() + np.tile(offset, 2)
            corners = np.array([matrix @ (x, y, 1) for x in (x1, x2) for y in (y1, y2)])[:, :2]
            low, high = corners.min(0), corners.max(0)
            clipped_low, clipped_high = low.clip(0, size), high.clip(0, size)
            side, full = clipped_high - clipped_low, high - low
            enough = side.prod() >= 0.1 * full.prod() and side.min() > 2 and side.max() < 100 * side.min()
            if enough or (bool(targets.ignore[n]) and side.min() > 0):
                rows.append((int(targets.labels[n]), *clipped_low, *clipped_high))
    return sorted(rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("content", ["whole", "bars"])
def test_pixels_and_boxes_match_the_float64_reference(seed, content):
    size, count = 24, 5
    rng = np.random.default_rng(seed)
    pictures = rng.random((count, 3, size, size))
    content_xyxy = np.tile([0.0, 0, size, size], (count, 1))
    if content == "bars":
        content_xyxy[::2, 1], content_xyxy[::2, 3] = 4, size - 5
        content_xyxy[1::2, 0], content_xyxy[1::2, 2] = 3, size - 2
    corner = rng.random((12, 2)) * 14
    boxes = np.concatenate((corner, corner + rng.random((12, 2)) * 12), axis=1)
    targets = targets_of(boxes, rng.integers(0, count, 12), rng.integers(0, 3, 12), rng.random(12) < 0.3)
    settings = replace(EVERYTHING, mixup=0.0, hue=0.0, saturation=0.0, value=0.0)
    if seed % 2:
        settings = replace(settings, degrees=0.0, shear=0.0)  # the axis-aligned path
    p = A.draw(count, generator=generator(seed), settings=settings)
    images, moved = augment(
        torch.tensor(pictures, dtype=torch.float32),
        targets,
        generator=generator(seed),
        settings=settings,
        content_xyxy=torch.tensor(content_xyxy),
    )
    for b in range(count):
        np.testing.assert_allclose(images[b].numpy(), reference_view(pictures, p, b, content_xyxy), atol=2e-4)
        mine = moved[moved.image == b]
        got = sorted((int(t), *map(float, box)) for t, box in zip(mine.labels, mine.boxes_xyxy))
        expected = reference_boxes(targets, p, b, content_xyxy, size)
        assert len(got) == len(expected)
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-3)


def test_the_four_pictures_of_a_mosaic_are_distinct_and_start_with_the_picture_itself():
    p = A.draw(16, generator=generator(), settings=EVERYTHING)
    assert torch.equal(p.neighbours[:, 0], torch.arange(16))
    assert all(len(set(row)) == 4 for row in p.neighbours.tolist())
    assert (p.mixup_partner != torch.arange(16)).all()


# ---------------------------------------------------------------- solid boxes, drawn and found again


def count_found(images, moved, *, rotated=False, tolerance=1.0) -> int:
    """Each box that is in its view once is where its colour is seen, to within `tolerance` pixels."""
    found = 0
    for b in range(len(images)):
        for n in (moved.image == b).nonzero()[:, 0]:
            label = int(moved.labels[n])
            if ((moved.image == b) & (moved.labels == label)).sum() != 1:
                continue
            mask = is_coloured(images[b], label)
            box = moved.boxes_xyxy[n].numpy()
            if rotated and ((box < 0.5) | (box > images.shape[-1] - 0.5)).any():
                continue  # cut by the edge of the view, a turned box fills less than the hull of its corners
            assert mask.any(), (b, label, box)
            np.testing.assert_allclose(find_box(mask), box, atol=tolerance)
            found += 1
    return found


@pytest.mark.parametrize(
    "change, at_least",
    [
        (dict(scale=0.5), 15),
        (dict(translate=0.3), 15),
        (dict(flip_horizontal=0.5, flip_vertical=0.5), 20),
        (dict(mosaic=1.0), 30),
        (dict(mosaic=1.0, scale=0.5, translate=0.1, flip_horizontal=0.5), 40),
        (dict(mosaic=0.5, scale=0.5, translate=0.1, flip_horizontal=0.5), 30),
    ],
    ids=["scale", "translate", "flip", "mosaic", "mosaic and affine", "mosaic in half of the views"],
)
def test_solid_boxes_are_found_where_the_boxes_say(change, at_least):
    found = 0
    for seed in range(4):
        images, targets = scene(seed=seed)
        out, moved = augment(images, targets, generator=generator(seed), settings=replace(NOTHING, **change))
        found += count_found(out, moved)
    assert found >= at_least


@pytest.mark.parametrize("change", [dict(degrees=45.0), dict(shear=20.0), dict(degrees=30.0, shear=10.0, scale=0.3)])
def test_turned_solid_boxes_are_found(change):
    # The pointed corner of a turned box is blurred: about one more pixel is lost at a threshold.
    found = 0
    for seed in range(6):
        images, targets = scene(seed=seed)
        out, moved = augment(images, targets, generator=generator(seed), settings=replace(NOTHING, **change))
        found += count_found(out, moved, rotated=True, tolerance=2.0)
    assert found >= 10


def test_mixup_shows_both_pictures_and_keeps_both_boxes():
    images, targets = scene(count=4)
    out, moved = augment(images, targets, generator=generator(), settings=replace(NOTHING, mixup=1.0))
    p = A.draw(4, generator=generator(), settings=replace(NOTHING, mixup=1.0))
    assert len(moved) == 8
    for b in range(4):
        w, guest = float(p.mixup_weight[b]), int(p.mixup_partner[b])
        expected = w * images[b].double() / 255 + (1 - w) * images[guest].double() / 255
        np.testing.assert_allclose(out[b].numpy(), expected.numpy(), atol=1e-6)
        assert sorted(moved.labels[moved.image == b].tolist()) == sorted([b, guest])


def test_a_picture_that_is_alone_has_no_partner():
    images, targets = torch.rand(1, 3, 32, 32), targets_of([[8, 8, 20, 24]], [0])
    out, moved = augment(images, targets, generator=generator(), settings=replace(NOTHING, mixup=1.0))
    assert torch.equal(out, images) and moved.boxes_xyxy.tolist() == [[8, 8, 20, 24]]
    for count in (1, 2, 3):  # and the draws of a batch do not depend on it
        assert (A.draw(count, generator=generator(), settings=replace(NOTHING, mixup=1.0)).mixup_weight < 1).all() == (
            count > 1
        )


def test_mixup_weight_follows_beta_32_32():
    p = A.draw(20_000 // 50, generator=generator(), settings=replace(NOTHING, mixup=1.0))
    weight = p.mixup_weight.numpy()
    assert abs(weight.mean() - 0.5) < 0.01
    assert abs(weight.std() - 0.5 / math.sqrt(65)) < 0.01  # the deviation of Beta(a, a) is 1/2 / sqrt(2a + 1)


# ---------------------------------------------------------------- colour


def test_hsv_matches_colorsys():
    rng = np.random.default_rng(0)
    pixels = rng.random((3, 3, 8, 8))
    pixels[0, :, 0] = np.array(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]]
    ).T
    hue, saturation, value = np.array([0.1, -0.4, 0.0]), np.array([0.3, 1.7, 1.0]), np.array([1.4, 0.6, 1.0])
    got = A.jitter_hsv(torch.tensor(pixels), *(torch.tensor(v) for v in (hue, saturation, value))).numpy()
    for b in range(3):
        for i in range(8):
            for j in range(8):
                h, s, v = colorsys.rgb_to_hsv(*pixels[b, :, i, j])
                changed = ((h + hue[b]) % 1, min(1, s * saturation[b]), min(1, v * value[b]))
                np.testing.assert_allclose(got[b, :, i, j], colorsys.hsv_to_rgb(*changed), atol=1e-6)
    np.testing.assert_allclose(got[2], pixels[2], atol=1e-7)  # no change is the identity


def test_jitter_does_not_write_into_its_input():
    images = torch.rand(2, 3, 8, 8)
    before = images.clone()
    A.jitter_hsv(images, torch.tensor([0.1, 0.2]), torch.tensor([0.5, 1.5]), torch.tensor([0.5, 1.5]))
    assert torch.equal(images, before)


# ---------------------------------------------------------------- identities and contracts


def test_all_zero_is_exactly_the_picture():
    images, targets = scene()
    targets = targets_of([[0.5, 0.5, 1.0, 90.0]], [3], ignore=[True])
    out, same = augment(images, targets, generator=generator(), settings=NOTHING)
    assert out.dtype == torch.float32 and torch.equal(out, images.float() / 255)
    assert all(torch.equal(getattr(same, f.name), getattr(targets, f.name)) for f in fields(Targets)[:4])


@pytest.mark.parametrize("settings", [EVERYTHING, AugmentConfig()], ids=["everything", "default"])
def test_uint8_and_float_input_give_the_same(settings):
    images, targets = scene()
    out, moved = augment(images, targets, generator=generator(3), settings=settings)
    out_float, moved_float = augment(images.float() / 255, targets, generator=generator(3), settings=settings)
    assert torch.equal(out, out_float) and torch.equal(moved.boxes_xyxy, moved_float.boxes_xyxy)
    assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1 + 1e-6


def test_generator_decides_everything():
    images, targets = scene()
    first, second, other = (augment(images, targets, generator=generator(s), settings=EVERYTHING) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1].boxes_xyxy, second[1].boxes_xyxy)
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    augment(images, targets, generator=generator(), settings=EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before)  # the global state is not touched


def test_as_many_numbers_are_drawn_whatever_the_settings():
    states = []
    for settings in (NOTHING, EVERYTHING):
        g = generator(4)
        A.draw(3, generator=g, settings=settings)
        states.append(g.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("settings", [EVERYTHING, AugmentConfig(), replace(AugmentConfig(), mosaic=0.0)])
def test_no_objects(settings):
    images, _ = scene()
    out, moved = augment(images, Targets.empty(), generator=generator(), settings=settings)
    assert out.isfinite().all() and len(moved) == 0 and moved.labels.dtype == torch.int64


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches_repeat_their_pictures(count):
    images, targets = scene(count=count)
    settings = replace(NOTHING, mosaic=1.0, mixup=1.0, scale=0.5)
    p = A.draw(count, generator=generator(), settings=settings)
    assert p.neighbours.max() < count and torch.equal(p.neighbours[:, 0], torch.arange(count))
    out, moved = augment(images, targets, generator=generator(), settings=settings)
    assert out.shape == images.shape and len(moved) >= 1 and moved.image.max() < count


def test_mosaic_without_mosaic_is_sample_affine():
    images, _ = scene()
    settings = replace(EVERYTHING, mosaic=0.0)
    p = A.draw(6, generator=generator(), settings=settings)
    matrices = A.affine_matrices(p, image_size=96)
    layout = A.mosaic_layout(p, None, image_size=96)
    assert layout.joint.isinf().all()
    pixels = images.float() / 255
    alone = A.sample_affine(pixels, matrices @ A.centring_matrix(96))
    torch.testing.assert_close(A.sample_mosaic(pixels, layout, matrices), alone, atol=2e-4, rtol=0)


def test_a_flip_is_exact():
    images, targets = scene()
    out, moved = augment(images, targets, generator=generator(), settings=replace(NOTHING, flip_horizontal=1.0))
    torch.testing.assert_close(out, images.flip(3).float() / 255, atol=2e-5, rtol=0)
    x1, _, x2, _ = targets.boxes_xyxy.unbind(1)
    torch.testing.assert_close(moved.boxes_xyxy[:, 0], 96 - x2)
    torch.testing.assert_close(moved.boxes_xyxy[:, 2], 96 - x1)


def test_hidden_objects_are_dropped_and_ignored_regions_stay_while_seen():
    # A view shifted by half its size: of widths 40, 3 px, 1 px, 0 px stay inside, or 2 of 10.
    boxes = [[0, 0, 51, 20], [0, 0, 49.5, 20], [0, 20, 49, 40], [90, 0, 99, 1.5], [60, 0, 99, 50]]
    moved = torch.tensor(boxes) - torch.tensor([48.0, 0, 48, 0])
    targets = targets_of(boxes, [0] * 5, labels=[0, 1, 2, 3, 4], ignore=[False, False, True, False, False])
    kept = A.drop_hidden(targets, moved, image_size=96)
    assert kept.labels.tolist() == [2, 4]  # 0 and 1: under a tenth visible; 2: ignored, 1 px seen; 3: too thin
    assert kept.boxes_xyxy.tolist() == [[0, 20, 1, 40], [12, 0, 51, 50]]
    assert kept.ignore.tolist() == [True, False]


def test_ignore_rows_move_with_their_picture():
    images, targets = scene()
    targets = replace(targets, ignore=torch.tensor([True, False] * 3))
    _, moved = augment(images, targets, generator=generator(), settings=EVERYTHING)
    assert torch.equal(moved.ignore, moved.labels % 2 == 0) and moved.ignore.any() and not moved.ignore.all()


def test_sampling_is_differentiable_in_the_pixels():
    """Dataset distillation learns pixels through the same augmentation."""
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    p = A.draw(2, generator=generator(), settings=replace(EVERYTHING, mosaic=1.0))
    matrices = A.affine_matrices(p, image_size=5)
    layout = A.mosaic_layout(p, None, image_size=5)
    assert torch.autograd.gradcheck(lambda x: A.sample_affine(x, matrices @ A.centring_matrix(5)), images)
    assert torch.autograd.gradcheck(lambda x: A.sample_mosaic(x, layout, matrices), images)


@pytest.mark.parametrize(
    "change", [dict(mosaic=1.5), dict(flip_vertical=-0.1), dict(scale=1.0), dict(degrees=-1.0), dict(hue=float("nan"))]
)
def test_settings_out_of_range_name_the_key(change):
    images, targets = scene()
    with pytest.raises(UserError, match=rf"augment\.{next(iter(change))}: found .*, expected"):
        augment(images, targets, generator=generator(), settings=replace(NOTHING, **change))


@pytest.mark.parametrize(
    "settings", [NOTHING, replace(EVERYTHING, mosaic=0.0), EVERYTHING], ids=["as is", "one", "all"]
)
def test_content_moves_as_the_pictures_do(settings):
    """White pictures in grey padding: the content is what is white afterwards, whatever the colours become."""
    content_xyxy = torch.tensor([[0.0, 12, 64, 52], [8.0, 0, 56, 64], [0.0, 0, 64, 64], [0.0, 30, 64, 34]])
    images = torch.full((4, 3, 64, 64), A.FILL)
    for image, (x1, y1, x2, y2) in zip(images, content_xyxy.int().tolist()):
        image[:, y1:y2, x1:x2] = 1.0
    plain = replace(settings, mixup=0.0, hue=0.0, saturation=0.0, value=0.0)
    moved, _ = augment(images, Targets.empty(), generator=generator(3), settings=plain, content_xyxy=content_xyxy)
    found = A.augment_content(content_xyxy, image_size=64, generator=generator(3), settings=settings)
    assert found.shape == (4, 1, 64, 64) and found.dtype == torch.bool
    differs = found[:, 0] != (moved[:, 0] > (1 + A.FILL) / 2)
    assert differs.float().mean() < 0.02 and 0.1 < found.float().mean() < 0.95  # borders to black and to grey
    if settings is NOTHING:
        assert not differs.any()
