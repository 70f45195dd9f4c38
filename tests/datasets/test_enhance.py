"""CLAHE against OpenCV's recorded output, the filters against float64 loops, and what must hold of every step."""

import itertools
import math

import numpy as np
import pytest

from datasets.enhance import (
    Enhancement,
    adjust_gamma,
    balance_grey_world,
    balance_white_patch,
    denoise,
    enhance,
    equalize_locally,
    equalize_plane,
    sharpen,
)

CASES = ("divides", "reflected", "steep", "flat", "one_tile", "tiny")
STEPS = {
    "denoise": lambda image: denoise(image, sigma_color=20.0),
    "grey_world": balance_grey_world,
    "white_patch": balance_white_patch,
    "clahe": equalize_locally,
    "gamma": lambda image: adjust_gamma(image, 1.4),
    "sharpen": lambda image: sharpen(image, amount=1.0),
}


def picture(height: int = 24, width: int = 31, seed: int = 0) -> np.ndarray:
    """A dim, reddish slope under noise."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(20, 130, width)[None, :, None] * np.array([1.0, 0.7, 0.5]) * np.ones((height, 1, 1))
    return (slope + rng.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("shape", [(24, 31), (1, 1), (1, 9), (7, 2)], ids=str)
def test_every_step_gives_a_new_picture_of_the_same_shape(step, shape):
    image = picture(*shape)
    before = image.copy()
    out = step(image)
    assert out.shape == image.shape and out.dtype == np.uint8 and out.flags.c_contiguous
    assert np.array_equal(image, before) and not np.shares_memory(out, image)


# ---------------------------------------------------------------- CLAHE


@pytest.mark.parametrize("name", CASES)
def test_clahe_is_opencvs(golden, name):
    """Equal but for halves, which float32 sums in another order round to the other side."""
    arrays, meta = golden("clahe_opencv")
    case = next(case for case in meta["cases"] if case["name"] == name)
    got = equalize_plane(arrays[f"{name}.input"], clip_limit=case["clip_limit"], tiles=case["tiles"])
    difference = np.abs(got.astype(int) - arrays[f"{name}.output"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.03


def test_clahe_without_a_limit_in_one_tile_is_histogram_equalization():
    plane = picture()[..., 0]
    levels, counts = np.unique(plane, return_counts=True)
    expected = np.rint(255 * np.cumsum(counts) / plane.size)[np.searchsorted(levels, plane)]
    assert np.array_equal(equalize_plane(plane, clip_limit=256.0, tiles=1), expected)


def test_a_lower_limit_stretches_contrast_less():
    plane = picture(96, 96)[..., 0]
    outs = [equalize_plane(plane, clip_limit=limit, tiles=4).astype(float) for limit in (0.5, 2.0, 4.0, 16.0)]
    local = [np.abs(np.diff(out, axis=1)).mean() for out in outs]
    assert all(low < 0.9 * high for low, high in itertools.pairwise(local))


def test_clahe_keeps_greys_grey_and_colour_differences():
    grey = np.repeat(picture()[..., :1], 3, axis=2)
    out = equalize_locally(grey)
    assert (out == out[..., :1]).all()
    assert np.array_equal(out[..., 0], equalize_plane(grey[..., 0], clip_limit=2.0, tiles=8))
    image = picture()
    out = equalize_locally(image).astype(int)
    inside = ((out > 0) & (out < 255)).all(-1)
    assert inside.sum() > 100
    assert np.array_equal(np.diff(out, axis=2)[inside], np.diff(image.astype(int), axis=2)[inside])


@pytest.mark.parametrize(
    "settings", [dict(clip_limit=0.0, tiles=8), dict(clip_limit=float("nan"), tiles=8), dict(clip_limit=2.0, tiles=0)]
)
def test_clahe_refuses(settings):
    with pytest.raises(ValueError, match="expected numbers above 0"):
        equalize_plane(picture()[..., 0], **settings)


# ---------------------------------------------------------------- colour of the light


def test_grey_world_makes_the_means_equal():
    means = balance_grey_world(picture(64, 64)).reshape(-1, 3).mean(0)
    assert np.ptp(means) < 0.5 and abs(means.mean() - picture(64, 64).mean()) < 0.5


def test_white_patch_makes_the_lightest_white():
    out = balance_white_patch(picture(64, 64))
    assert np.abs(np.percentile(out.reshape(-1, 3), 99, axis=0) - 255).max() <= 1


@pytest.mark.parametrize("balance", [balance_grey_world, balance_white_patch])
def test_balances(balance):
    image = picture()
    assert np.array_equal(balance(image, strength=0.0), image)
    half, whole = (balance(image, strength=s).reshape(-1, 3).mean(0) for s in (0.5, 1.0))
    start = image.reshape(-1, 3).mean(0)
    assert np.allclose(half / start, np.sqrt(whole / start), rtol=0.03)  # gains of half the strength, twice
    for empty in (np.zeros((4, 5, 3), np.uint8), image * np.array([1, 1, 0], np.uint8)):
        out = balance(empty)
        assert out[..., 2].max() == 0 and np.array_equal(out, balance(empty))
    grey = np.full((4, 4, 3), 90, np.uint8)
    assert (np.ptp(balance(grey), axis=2) == 0).all()


def test_grey_world_twice_is_grey_world_once():
    image = picture(64, 64)
    once = balance_grey_world(image)
    assert np.abs(balance_grey_world(once).astype(int) - once).max() <= 1


# ---------------------------------------------------------------- brightness


def test_gamma():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(adjust_gamma(image, 1.0), image)
    for gamma in (0.4, 2.2):
        out = adjust_gamma(image, gamma)
        expected = [round(255 * math.pow(v / 255, 1 / gamma)) for v in range(256)]
        assert out[..., 0].ravel().tolist() == expected
        assert out.min() == 0 and out.max() == 255
    assert adjust_gamma(image, 2.2).mean() > image.mean() > adjust_gamma(image, 0.4).mean()
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            adjust_gamma(image, gamma)


# ---------------------------------------------------------------- sharpness and noise


def reference_denoise(image, sigma_color, sigma_space):
    x, out = image.astype(np.float64), np.zeros(image.shape)
    radius = math.ceil(2 * sigma_space)
    height, width = image.shape[:2]
    for y1, x1 in np.ndindex(height, width):
        total, weights = np.zeros(3), 0.0
        for y2, x2 in np.ndindex(height, width):
            distance = math.hypot(y2 - y1, x2 - x1)
            if distance <= radius:
                color = np.sum((x[y1, x1] - x[y2, x2]) ** 2)
                weight = math.exp(-(distance**2) / (2 * sigma_space**2) - color / (2 * sigma_color**2))
                total, weights = total + weight * x[y2, x2], weights + weight
        out[y1, x1] = total / weights
    return out


@pytest.mark.parametrize("shape", [(9, 11), (2, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("sigmas", [(15.0, 1.5), (60.0, 0.8)], ids=str)
def test_denoise_is_the_bilateral_filter(shape, sigmas):
    image = picture(*shape)
    got = denoise(image, sigma_color=sigmas[0], sigma_space=sigmas[1])
    assert np.abs(got - reference_denoise(image, *sigmas)).max() <= 0.501


def test_denoise_removes_noise_and_keeps_edges():
    rng = np.random.default_rng(0)
    clean = np.zeros((32, 32, 3)) + 60
    clean[:, 16:] = 190
    noisy = (clean + rng.normal(0, 8, clean.shape)).clip(0, 255).astype(np.uint8)
    out = denoise(noisy, sigma_color=30.0)
    assert np.abs(out - clean).mean() < 0.45 * np.abs(noisy - clean).mean()
    assert (out[:, 16].astype(int) - out[:, 15]).min() > 110
    assert np.array_equal(denoise(noisy, sigma_color=1e-3), noisy)  # nobody is alike: nothing changes


def reference_sharpen(image, amount, sigma):
    radius = math.ceil(3 * sigma)
    taps = np.array([math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)])
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    out = np.zeros(image.shape)
    for y, x in np.ndindex(image.shape[:2]):
        window = padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
        out[y, x] = image[y, x] + amount * (image[y, x] - np.tensordot(kernel, window))
    return out.clip(0, 255)


@pytest.mark.parametrize("shape", [(12, 17), (3, 2), (1, 1)], ids=str)
def test_sharpen_is_unsharp_masking(shape):
    image = picture(*shape)
    got = sharpen(image, amount=1.7, sigma=1.2)
    assert np.abs(got - reference_sharpen(image, 1.7, 1.2)).max() <= 0.501


def test_sharpen_leaves_what_has_no_detail():
    image = picture()
    assert np.array_equal(sharpen(image, amount=0.0), image)
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.array_equal(sharpen(flat, amount=3.0), flat)


@pytest.mark.parametrize("call", [
    lambda image: denoise(image, sigma_color=0.0),
    lambda image: denoise(image, sigma_color=1.0, sigma_space=-1.0),
    lambda image: sharpen(image, amount=1.0, sigma=0.0),
])  # fmt: skip
def test_filters_refuse_widths_of_nothing(call):
    with pytest.raises(ValueError, match="above 0"):
        call(picture())


# ---------------------------------------------------------------- all of them


def test_enhance_takes_the_steps_in_its_order():
    image = picture(40, 40)
    out = enhance(image, Enhancement(denoise=12.0, white_patch=0.8, clahe=3.0, gamma=1.2, sharpen=0.7))
    expected = balance_white_patch(denoise(image, sigma_color=12.0), strength=0.8)
    expected = sharpen(adjust_gamma(equalize_locally(expected, clip_limit=3.0), 1.2), amount=0.7)
    assert np.array_equal(out, expected)
    assert np.array_equal(enhance(image, Enhancement(grey_world=1.0)), balance_grey_world(image))


def test_enhance_without_steps_is_a_copy():
    image = picture()
    out = enhance(image, Enhancement())
    assert np.array_equal(out, image) and out is not image
