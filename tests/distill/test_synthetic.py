"""The synthetic set: tiles and their boxes there and back, the prior, and pixels that move alone."""

import numpy as np
import pytest
import torch

from distill.synthetic import PixelOptimizer, SyntheticSet, join_tiles, pack_targets, split_tiles, total_variation
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


def test_formation_one_is_the_identity():
    pictures, targets = scene(3)
    out, same = SyntheticSet(pictures, targets).decode(torch.arange(3))
    assert torch.equal(out, pictures)
    assert torch.equal(same.boxes_xyxy, targets.boxes_xyxy) and torch.equal(same.image, targets.image)


@pytest.mark.parametrize("formation", [1, 2, 3])
def test_tiles_lie_row_by_row_and_come_back(formation):
    stored = torch.rand(2, 3, 12, 12)
    tiles = split_tiles(stored, formation)
    side = 12 // formation
    for picture in range(2):
        for y in range(formation):
            for x in range(formation):
                expected = stored[picture, :, y * side : (y + 1) * side, x * side : (x + 1) * side]
                assert torch.equal(tiles[(picture * formation + y) * formation + x], expected)
    assert torch.equal(join_tiles(tiles, formation), stored)


@pytest.mark.parametrize("formation", [1, 2, 3])
def test_boxes_packed_and_decoded_are_where_they_were(formation):
    pictures, targets = scene(2 * formation**2)
    synthetic = SyntheticSet.from_pictures(pictures, targets, formation)
    assert len(synthetic) == 2 and synthetic.targets.boxes_xyxy.max() <= 24
    out, same = synthetic.decode(torch.arange(2))
    assert out.shape == pictures.shape
    torch.testing.assert_close(same.boxes_xyxy, targets.boxes_xyxy, atol=1e-4, rtol=0)
    for name in ("labels", "image", "ignore"):
        assert torch.equal(getattr(same, name), getattr(targets, name))


def test_pixels_survive_a_formation_as_far_as_they_can():
    """A picture without detail comes back exactly; a solid box is found where its box says, to half a pixel."""
    plain = torch.rand(4, 3, 1, 1).expand(4, 3, 24, 24)
    out, _ = SyntheticSet.from_pictures(plain, Targets.empty(), 2).decode(torch.tensor([0]))
    torch.testing.assert_close(out, plain)
    solid = torch.zeros(4, 3, 24, 24)
    solid[2, :, 6:14, 4:20] = 1
    out, targets = SyntheticSet.from_pictures(solid, targets_of([[4, 6, 20, 14]], [2]), 2).decode(torch.tensor([0]))
    inside = (out[2, 0] > 0.5).nonzero()
    assert inside.amin(0).tolist() == [6, 4] and inside.amax(0).tolist() == [13, 19]
    assert targets.boxes_xyxy.tolist() == [[4, 6, 20, 14]] and not out[[0, 1, 3]].any()


def test_decoding_some_rows_is_a_part_of_decoding_all():
    pictures, targets = scene(16)
    synthetic = SyntheticSet.from_pictures(pictures, targets, 2)
    everything, all_targets = synthetic.decode(torch.arange(4))
    some, some_targets = synthetic.decode(torch.tensor([2, 0]))
    assert torch.equal(some, torch.cat((everything[8:12], everything[:4])))
    for picture, row in enumerate([8, 9, 10, 11, 0, 1, 2, 3]):
        here, there = some_targets.image == picture, all_targets.image == row
        assert torch.equal(some_targets.boxes_xyxy[here], all_targets.boxes_xyxy[there])
        assert torch.equal(some_targets.labels[here], all_targets.labels[there])
    none, no_targets = synthetic.decode(torch.tensor([], dtype=torch.int64))
    assert len(none) == 0 and len(no_targets) == 0


def test_decoding_is_differentiable_in_the_pixels():
    pictures, targets = scene(4, size=6)
    synthetic = SyntheticSet.from_pictures(pictures.double(), targets, 2)
    rows = torch.tensor([0])
    assert torch.autograd.gradcheck(lambda x: synthetic.decode(rows, x)[0], synthetic.pixels.detach().requires_grad_())
    synthetic.decode(rows)[0].sum().backward()
    assert synthetic.pixels.grad.abs().sum() > 0


def test_a_set_without_objects():
    synthetic = SyntheticSet(torch.rand(2, 3, 8, 8), Targets.empty(), 2)
    pictures, targets = synthetic.decode(torch.arange(2))
    assert pictures.shape == (8, 3, 8, 8) and len(targets) == 0


def test_noise_is_uniform_under_the_given_layout():
    _, targets = scene(8, size=24)
    draw = lambda seed: SyntheticSet.from_noise(
        targets, count=2, image_size=24, formation=2, generator=torch.Generator().manual_seed(seed)
    )
    synthetic = draw(0)
    assert synthetic.pixels.shape == (2, 3, 24, 24) and synthetic.pixels.std().item() == pytest.approx(12**-0.5, 0.05)
    _, same = synthetic.decode(torch.arange(2))
    torch.testing.assert_close(same.boxes_xyxy, targets.boxes_xyxy, atol=1e-4, rtol=0)
    assert torch.equal(draw(0).pixels, synthetic.pixels) and not torch.equal(draw(1).pixels, synthetic.pixels)


def test_what_does_not_fit_is_refused():
    pixels = torch.rand(1, 3, 24, 24)
    with pytest.raises(ValueError, match=r"object 1: box \[10.0, 2.0, 16.0, 8.0\] is not within one of 2 x 2 tiles"):
        SyntheticSet(pixels, targets_of([[1, 1, 11, 11], [10, 2, 16, 8]], [0, 0]), 2)
    with pytest.raises(ValueError, match="24 x 24 pixels in 5 x 5 tiles"):
        SyntheticSet(pixels, Targets.empty(), 5)
    with pytest.raises(ValueError, match=r"picture 1, expected 0\.\.0"):
        SyntheticSet(pixels, targets_of([[1, 1, 5, 5]], [1]))
    with pytest.raises(ValueError, match="3 pictures of 24 pixels in 2 x 2 tiles"):
        SyntheticSet.from_pictures(torch.rand(3, 3, 24, 24), Targets.empty(), 2)


def test_state_fills_a_set_of_the_same_objects_only():
    pictures, targets = scene(8)
    first = SyntheticSet.from_pictures(pictures, targets, 2)
    state = first.state_dict()
    again = SyntheticSet.from_pictures(torch.rand_like(pictures), targets, 2)
    memory = again.pixels.data_ptr()
    again.load_state_dict(state)
    assert torch.equal(again.pixels, first.pixels) and again.pixels.data_ptr() == memory
    assert torch.equal(SyntheticSet.from_state(state).pixels, first.pixels)
    for other in (SyntheticSet.from_pictures(pictures, targets[1:], 2), SyntheticSet(first.pixels, first.targets)):
        with pytest.raises(ValueError, match="another synthetic set"):
            other.load_state_dict(state)


@pytest.mark.parametrize("formation", [1, 2])
def test_total_variation_matches_loops_and_stops_at_tiles(formation):
    x = np.random.default_rng(0).uniform(size=(2, 3, 8, 8))
    side = 8 // formation
    for picture, got in zip(x, total_variation(torch.tensor(x), formation)):
        down = [
            abs(picture[c, i + 1, j] - picture[c, i, j])
            for c in range(3) for i in range(7) for j in range(8) if (i + 1) % side
        ]  # fmt: skip
        right = [
            abs(picture[c, i, j + 1] - picture[c, i, j])
            for c in range(3) for i in range(8) for j in range(7) if (j + 1) % side
        ]  # fmt: skip
        assert got.item() == pytest.approx(np.mean(down) + np.mean(right), rel=1e-12)


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
    with pytest.raises(ValueError, match="expected sgd or adam"):
        PixelOptimizer(synthetic, name="lbfgs", learning_rate=1, momentum=0)


def test_packing_of_targets_by_hand():
    packed = pack_targets(targets_of([[0, 0, 8, 4], [8, 8, 24, 16]], [1, 6]), 24, 2)
    assert packed.boxes_xyxy.tolist() == [[12, 0, 16, 2], [4, 16, 12, 20]] and packed.image.tolist() == [0, 1]
