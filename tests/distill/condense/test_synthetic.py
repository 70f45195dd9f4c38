"""The synthetic set: tiles and their boxes there and back, the prior, and pixels that move alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill.condense.synthetic import PADDING, PixelOptimizer, SyntheticSet, tile_area
from structures import Targets


def targets_of(boxes, image, size=None) -> Targets:
    count = len(image)
    return Targets(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.arange(count) % 3,
        torch.tensor(image, dtype=torch.int64),
        torch.arange(count) % 4 == 3,
    )


def scene(count: int, size: int = 24, seed: int = 0) -> tuple[torch.Tensor, Targets]:
    """Pictures with up to three boxes; the last picture has none."""
    rng = np.random.default_rng(seed)
    boxes, image = [], []
    for picture in range(count - 1):
        for _ in range(rng.integers(1, 4)):
            x, y, w, h = rng.uniform(0, size / 2, 4)
            boxes.append([x, y, x + w, y + h])
            image.append(picture)
    return torch.tensor(rng.uniform(size=(count, 3, size, size)), dtype=torch.float32), targets_of(boxes, image)


WIDE = (0, 3, 24, 21)  # content of a letterboxed picture of 4 x 3
FORMATIONS = [(1, 1), (2, 2), (3, 2), (1, 4), (5, 1)]


def letterboxed(count: int, size: int = 24) -> tuple[torch.Tensor, Targets, torch.Tensor]:
    """Pictures of three shapes on grey, boxes within their content, and the content."""
    pictures, targets = scene(count, size)
    shapes = torch.tensor([[0, 3, 24, 21], [5, 0, 18, 24], [0, 0, 24, 24]])
    content = shapes[torch.arange(count) % 3]
    x, y = torch.arange(size)[None, :], torch.arange(size)[:, None]
    for picture, (x1, y1, x2, y2) in zip(pictures, content):
        picture[:, (x < x1) | (x >= x2) | (y < y1) | (y >= y2)] = PADDING
    area = content[targets.image].float()
    boxes = torch.maximum(torch.minimum(targets.boxes_xyxy, area[:, 2:].repeat(1, 2)), area[:, :2].repeat(1, 2))
    return pictures, Targets(boxes, targets.labels, targets.image, targets.ignore), content


def test_one_tile_is_the_identity():
    pictures, targets, content = letterboxed(4)
    for made in (SyntheticSet(pictures, targets), SyntheticSet.from_pictures(pictures, targets, (1, 1), content)):
        out, same = made.decode(torch.arange(4))
        assert torch.equal(out, pictures) and torch.equal(made.pixels, pictures)
        for objects in (same, made.stored_targets()):
            assert torch.equal(objects.boxes_xyxy, targets.boxes_xyxy) and torch.equal(objects.image, targets.image)


@pytest.mark.parametrize("formation", FORMATIONS)
def test_tiles_fill_their_cells_and_share_no_pixel(formation):
    """Each within its cell, as large as the cell or the content, whichever is smaller, and in the middle of it."""
    rows, columns = formation
    for content in ([0, 3, 24, 21], [0, 0, 24, 24], [11, 0, 13, 24]):
        taken = np.zeros((24, 24), dtype=int)
        for tile in range(rows * columns):
            i, j = divmod(tile, columns)
            top, bottom, left, right = i * 24 // rows, (i + 1) * 24 // rows, j * 24 // columns, (j + 1) * 24 // columns
            x1, y1, x2, y2 = tile_area(tile, 24, formation, content)
            assert left <= x1 and x2 <= right and top <= y1 and y2 <= bottom
            assert x2 - x1 == min(right - left, content[2] - content[0])
            assert y2 - y1 == min(bottom - top, content[3] - content[1])
            assert 0 <= (right - x2) - (x1 - left) <= 1 and 0 <= (bottom - y2) - (y1 - top) <= 1
            taken[y1:y2, x1:x2] += 1
        assert taken.max() == 1
        if content == [0, 0, 24, 24]:
            assert taken.all()


@pytest.mark.parametrize("formation", FORMATIONS)
def test_boxes_packed_and_decoded_are_where_they_were(formation):
    tiles = formation[0] * formation[1]
    pictures, targets, content = letterboxed(2 * tiles)
    synthetic = SyntheticSet.from_pictures(pictures, targets, formation, content)
    assert len(synthetic) == 2 and synthetic.tiles == tiles
    out, same = synthetic.decode(torch.arange(2))
    assert out.shape == pictures.shape
    for name in ("boxes_xyxy", "labels", "image", "ignore"):
        assert torch.equal(getattr(same, name), getattr(targets, name))
    for picture, (x1, y1, x2, y2) in zip(out, content.tolist()):  # on grey, in its place
        grey = torch.full_like(picture, PADDING)
        grey[:, y1:y2, x1:x2] = picture[:, y1:y2, x1:x2]
        assert torch.equal(grey, picture)


def test_boxes_of_the_stored_pictures_by_hand():
    """Tile 1 of 3 x 2 in 24 pixels: columns 12 to 24 and rows 0 to 8, for a content of 24 x 18 pixels."""
    content = torch.tensor([WIDE] * 12)
    targets = targets_of([[0, 3, 24, 21], [8, 12, 16, 21], [0, 3, 24, 21]], [1, 6, 11])
    stored = SyntheticSet(torch.rand(2, 3, 24, 24), targets, (3, 2), content).stored_targets()
    expected = [[12, 0, 24, 8], [4, 4, 8, 8], [12, 16, 24, 24]]
    torch.testing.assert_close(stored.boxes_xyxy, torch.tensor(expected, dtype=torch.float32))
    assert stored.image.tolist() == [0, 1, 1] and stored.labels.tolist() == targets.labels.tolist()


@pytest.mark.parametrize("formation", [(2, 2), (3, 2), (4, 3)])
def test_tiles_are_reduced_and_enlarged_as_pillow_does_it(formation):
    """Its bicubic filter, which widens with the step when it reduces, to the rounding of 8 bits, twice."""
    rng = np.random.default_rng(0)
    small = rng.integers(80, 176, (9, 12, 3), dtype=np.uint8)  # no overshoot is clipped, in between either
    picture = Image.fromarray(small).resize((48, 36), Image.Resampling.BICUBIC)
    square = torch.full((3, 48, 48), PADDING)
    square[:, 6:42] = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    tiles, content = formation[0] * formation[1], torch.tensor([0, 6, 48, 42])
    pictures = square.expand(tiles, -1, -1, -1)
    synthetic = SyntheticSet.from_pictures(pictures, Targets.empty(), formation, content.repeat(tiles, 1))
    out, _ = synthetic.decode(torch.tensor([0]))
    x1, y1, x2, y2 = tile_area(0, 48, formation, content.tolist())
    reduced = picture.resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
    difference = synthetic.pixels[0, :, y1:y2, x1:x2].detach().permute(1, 2, 0).numpy() * 255 - np.asarray(reduced)
    assert np.abs(difference).max() < 2
    enlarged = np.asarray(reduced.resize((48, 36), Image.Resampling.BICUBIC))
    assert np.abs(out[0, :, 6:42].detach().permute(1, 2, 0).numpy() * 255 - enlarged).max() < 4


def test_pixels_survive_a_formation_as_far_as_they_can():
    """A picture without detail comes back exactly; a solid box is found where its box says, to half a pixel."""
    plain = torch.rand(4, 3, 1, 1).expand(4, 3, 24, 24)
    out, _ = SyntheticSet.from_pictures(plain, Targets.empty(), (2, 2)).decode(torch.tensor([0]))
    torch.testing.assert_close(out, plain)
    solid = torch.zeros(4, 3, 24, 24)
    solid[2, :, 6:14, 4:20] = 1
    made = SyntheticSet.from_pictures(solid, targets_of([[4, 6, 20, 14]], [2]), (2, 2))
    out, targets = made.decode(torch.tensor([0]))
    inside = (out[2, 0] > 0.5).nonzero()
    assert inside.amin(0).tolist() == [6, 4] and inside.amax(0).tolist() == [13, 19]
    assert targets.boxes_xyxy.tolist() == [[4, 6, 20, 14]] and not out[[0, 1, 3]].any()


def test_decoding_some_rows_is_a_part_of_decoding_all():
    pictures, targets, content = letterboxed(24)
    synthetic = SyntheticSet.from_pictures(pictures, targets, (3, 2), content)
    everything, all_targets = synthetic.decode(torch.arange(4))
    some, some_targets = synthetic.decode(torch.tensor([2, 0]))
    numbers = [12, 13, 14, 15, 16, 17, 0, 1, 2, 3, 4, 5]
    assert synthetic.numbers(torch.tensor([2, 0])).tolist() == numbers and torch.equal(some, everything[numbers])
    for picture, row in enumerate(numbers):
        here, there = some_targets.image == picture, all_targets.image == row
        assert torch.equal(some_targets.boxes_xyxy[here], all_targets.boxes_xyxy[there])
        assert torch.equal(some_targets.labels[here], all_targets.labels[there])
    none, no_targets = synthetic.decode(torch.tensor([], dtype=torch.int64))
    assert none.shape == (0, 3, 24, 24) and len(no_targets) == 0


def test_decoding_is_differentiable_in_the_pixels():
    pictures, targets = scene(6, size=8)
    content = torch.tensor([[0, 1, 8, 7]]).repeat(6, 1)
    synthetic = SyntheticSet.from_pictures(pictures.double() * 0.5 + 0.25, targets, (3, 2), content)
    rows = torch.tensor([0])
    assert torch.autograd.gradcheck(lambda x: synthetic.decode(rows, x)[0], synthetic.pixels.detach().requires_grad_())
    synthetic.decode(rows)[0].sum().backward()
    assert synthetic.pixels.grad.abs().sum() > 0


def test_a_set_without_objects():
    synthetic = SyntheticSet(torch.rand(2, 3, 8, 8), Targets.empty(), (2, 2))
    pictures, targets = synthetic.decode(torch.arange(2))
    assert pictures.shape == (8, 3, 8, 8) and len(targets) == len(synthetic.stored_targets()) == 0


def test_noise_is_uniform_under_the_given_layout():
    _, targets = scene(8, size=24)
    draw = lambda seed: SyntheticSet.from_noise(
        targets, count=2, image_size=24, formation=(2, 2), generator=torch.Generator().manual_seed(seed)
    )
    synthetic = draw(0)
    assert synthetic.pixels.shape == (2, 3, 24, 24) and synthetic.pixels.std().item() == pytest.approx(12**-0.5, 0.05)
    _, same = synthetic.decode(torch.arange(2))
    assert torch.equal(same.boxes_xyxy, targets.boxes_xyxy)
    assert torch.equal(draw(0).pixels, synthetic.pixels) and not torch.equal(draw(1).pixels, synthetic.pixels)


def test_what_does_not_fit_is_refused():
    pixels = torch.rand(1, 3, 24, 24)
    with pytest.raises(ValueError, match="24 x 24 pixels in 25 x 1 tiles"):
        SyntheticSet(pixels, Targets.empty(), (25, 1))
    with pytest.raises(ValueError, match=r"image 4, expected 0\.\.3"):
        SyntheticSet(pixels, targets_of([[1, 1, 5, 5]], [4]), (2, 2))
    with pytest.raises(ValueError, match="3 images in 2 x 2 tiles"):
        SyntheticSet.from_pictures(torch.rand(3, 3, 24, 24), Targets.empty(), (2, 2))
    for content in ([[0, 0, 24, 25]], [[3, 0, 3, 24]], [[0, 0, 24, 24]] * 2):
        with pytest.raises(ValueError, match="expected 1 areas within 24 pixels"):
            SyntheticSet(pixels, Targets.empty(), (1, 1), torch.tensor(content))


def test_state_fills_a_set_of_the_same_objects_only():
    pictures, targets, content = letterboxed(12)
    first = SyntheticSet.from_pictures(pictures, targets, (3, 2), content)
    state = first.state_dict()
    again = SyntheticSet.from_pictures(torch.rand_like(pictures), targets, (3, 2), content)
    memory = again.pixels.data_ptr()
    again.load_state_dict(state)
    assert torch.equal(again.pixels, first.pixels) and again.pixels.data_ptr() == memory
    assert torch.equal(SyntheticSet.from_state(state).pixels, first.pixels)
    others = (
        SyntheticSet.from_pictures(pictures, targets[1:], (3, 2), content),
        SyntheticSet(first.pixels, targets, (2, 3), content),
        SyntheticSet(first.pixels, targets, (3, 2)),
    )
    for other in others:
        with pytest.raises(ValueError, match="another synthetic set"):
            other.load_state_dict(state)


@pytest.mark.parametrize("formation", [(1, 1), (2, 2), (3, 2)])
def test_total_variation_matches_loops_and_stops_at_tiles(formation):
    x = np.random.default_rng(0).uniform(size=(2, 3, 12, 12))
    height, width = 12 // formation[0], 12 // formation[1]
    synthetic = SyntheticSet(torch.tensor(x), Targets.empty(), formation)
    rows = torch.arange(2)
    for picture, got in zip(x, synthetic.total_variation(rows, synthetic.pixels)):
        down = [
            abs(picture[c, i + 1, j] - picture[c, i, j])
            for c in range(3) for i in range(11) for j in range(12) if (i + 1) % height
        ]  # fmt: skip
        right = [
            abs(picture[c, i, j + 1] - picture[c, i, j])
            for c in range(3) for i in range(12) for j in range(11) if (j + 1) % width
        ]  # fmt: skip
        assert got.item() == pytest.approx(np.mean(down) + np.mean(right), rel=1e-12)


def test_total_variation_leaves_padding_out():
    pixels, content = torch.rand(1, 3, 24, 24), torch.tensor([WIDE])
    variation = lambda x: SyntheticSet(x, Targets.empty(), (1, 1), content).total_variation(torch.tensor([0]), x)
    other = torch.rand(1, 3, 24, 24)
    other[:, :, 3:21] = pixels[:, :, 3:21]
    assert torch.equal(variation(pixels), variation(other)) and variation(pixels) > 0


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_picture_moves_as_if_it_were_alone(name):
    """Its own state, which rests while others move; and only its own pixels."""
    slopes = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = SyntheticSet(torch.full((3, 3, 4, 4), 0.5), Targets.empty())
    optimizer = PixelOptimizer(together, name=name, learning_rate=0.02, momentum=0.5)
    for step, slope in enumerate(slopes):
        rows = torch.tensor([0, 2]) if step % 2 else torch.tensor([0])
        optimizer.step(rows, slope[: len(rows)])
    for row, own in ((0, slopes[:, 0]), (2, slopes[1::2, 1])):
        alone = torch.full((3, 4, 4), 0.5, requires_grad=True)
        expected = (
            torch.optim.SGD([alone], 0.02, momentum=0.5)
            if name == "sgd"
            else torch.optim.Adam([alone], 0.02, betas=(0.5, 0.999))
        )
        for slope in own:
            alone.grad = slope.clone()
            expected.step()
            alone.data.clamp_(0, 1)
        torch.testing.assert_close(together.pixels[row], alone)
    assert torch.equal(together.pixels[1], torch.full((3, 4, 4), 0.5))


def test_pixels_stay_colours_and_the_optimizer_goes_on_from_its_state():
    slopes = torch.randn(6, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(2)

    def build() -> tuple[SyntheticSet, PixelOptimizer]:
        synthetic = SyntheticSet(torch.full((2, 3, 4, 4), 0.5), Targets.empty())
        return synthetic, PixelOptimizer(synthetic, name="adam", learning_rate=0.3, momentum=0.5)

    synthetic, optimizer = build()
    other, resumed = build()
    for step, slope in enumerate(slopes):
        if step == 3:
            other.load_state_dict(synthetic.state_dict())
            resumed.load_state_dict(optimizer.state_dict())
        optimizer.step(rows, slope)
        if step >= 3:
            resumed.step(rows, slope)
    assert torch.equal(other.pixels, synthetic.pixels)
    assert synthetic.pixels.min() == 0 and synthetic.pixels.max() == 1
    with pytest.raises(ValueError, match="expected sgd, adam or normalized"):
        PixelOptimizer(synthetic, name="lbfgs", learning_rate=1, momentum=0)


def test_normalized_steps_are_of_one_length_whatever_the_slope():
    """By hand: m is a mean of slopes over their root mean squares; a picture without a slope stays."""
    slopes = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    slopes[:, 0] *= 1e-6
    slopes[:, 1] *= 1e3
    synthetic = SyntheticSet(torch.full((3, 3, 4, 4), 0.5), Targets.empty())
    optimizer = PixelOptimizer(synthetic, name="normalized", learning_rate=0.01, momentum=0.9)
    expected = np.full((2, 3, 4, 4), 0.5)
    m = None
    for slope in slopes:
        optimizer.step(torch.tensor([0, 1, 2]), torch.cat((slope, torch.zeros(1, 3, 4, 4))))
        unit = slope.double().numpy() / np.sqrt((slope.double().numpy() ** 2).mean((1, 2, 3), keepdims=True))
        m = unit if m is None else 0.9 * m + 0.1 * unit
        expected -= 0.01 * m
    np.testing.assert_allclose(synthetic.pixels.detach()[:2], expected, atol=1e-6)
    assert torch.equal(synthetic.pixels[2], torch.full((3, 4, 4), 0.5))
