"""The embedded dataset: eight shapes on textured grounds, drawn here: everything can be tried without a download.

    python -m datasets.shapes ROOT --train 1000 --test 300 --image-size 160 --seed 0

Classes differ only in outline: every class has any colour, texture, size, rotation and stretch. Objects overlap, some
are small or low in contrast, and lines and blobs lie between them. Every picture is a pure function of (seed, split,
index).

A box is tight around the complete outline of an object, including hidden parts, and clipped to the picture. At least
MIN_VISIBLE of every object is visible: a placement that would hide more of itself or of another object is drawn again
elsewhere, so every drawn object has a label.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from errors import ArgumentParser, UserError, run_script
from yaml_files import dump_yaml

NAMES = ("disk", "ring", "square", "triangle", "hexagon", "star", "cross", "heart")
SPLITS = ("train", "test")
VERSION = 1  # of the drawing: raise it with every change of what is drawn
MANIFEST = "shapes.json"
MIN_VISIBLE = 0.3
JPEG_QUALITY = 95
SUPERSAMPLING = 4  # of outlines, per axis


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        "python -m datasets.shapes",
        __doc__,
        epilog="Example: python -m datasets.shapes data/shapes --train 2000 --test 500 --image-size 160\n"
        "Exit codes: 0 written, 2 a mistake in the arguments or the data, 5 a file that could not be written, "
        "130 after Ctrl-C.",
    )
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="number of training pictures (%(default)s)")
    parser.add_argument("--test", type=int, default=300, help="number of test pictures (%(default)s)")
    parser.add_argument("--image-size", type=int, default=160, help="side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    a = parser.parse_args(argv)
    fresh = make_shapes(a.root, train=a.train, test=a.test, image_size=a.image_size, seed=a.seed)
    print(f"{a.root}: {a.train} training and {a.test} test pictures" + ("" if fresh else ", already there"))


def make_shapes(root: str | Path, *, train: int, test: int, image_size: int, seed: int) -> bool:
    """Write the set as YOLO text: images/<split>/*.jpg, labels/<split>/*.txt, data.yaml, and a manifest.

    True if it was written; False if the folder already had exactly this set. The folder appears complete or not at all.
    UserError if the folder has other files; they are never replaced.
    """
    if min(train, test) < 0 or image_size < 32 or seed < 0:
        raise UserError(
            f"shapes: found train {train}, test {test}, image size {image_size}, seed {seed}; "
            "expected counts and a seed of at least 0 and a size of at least 32"
        )
    root = Path(root)
    recipe = {"version": VERSION, "train": train, "test": test, "image_size": image_size, "seed": seed}
    if root.is_dir() and any(root.iterdir()):
        _check_existing(root, recipe)
        return False
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            _write_set(partial, recipe)
            partial.chmod(0o755)  # mkdtemp's folder is for its owner only
            os.replace(partial, root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}", exit_code=5) from None
    return True


def _check_existing(root: Path, recipe: dict) -> None:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["recipe"]
        sizes = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{root}: found other files, expected no folder or one that holds the shapes") from None
    if found != recipe:
        raise UserError(f"{root}: found the set {found}, expected {recipe}; remove the folder or name another")
    for name, size in sizes.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path}: missing or changed; remove the folder {root} and generate it again")


def _write_set(root: Path, recipe: dict) -> None:
    files = {}

    def write(name: str, data: bytes) -> None:
        (root / name).write_bytes(data)
        files[name] = len(data)

    size = recipe["image_size"]
    for split in SPLITS:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(recipe[split]):
            picture, boxes_xyxy, labels = draw_picture(recipe["seed"], split, index, size)
            name = f"images/{split}/{index:06d}.jpg"
            Image.fromarray(picture).save(root / name, quality=JPEG_QUALITY, subsampling=0)
            files[name] = (root / name).stat().st_size
            x1, y1, x2, y2 = (boxes_xyxy / size).T
            rows = zip(labels, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            text = "".join("{} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in rows)
            write(f"labels/{split}/{index:06d}.txt", text.encode())
    tree = {"train": "images/train", "val": "images/test", "test": "images/test", "names": list(NAMES)}
    write("data.yaml", dump_yaml(tree).encode())
    (root / MANIFEST).write_text(json.dumps({"recipe": recipe, "files": files}, indent=0), encoding="utf-8")


def draw_picture(seed: int, split: str, index: int, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB uint8 (S, S, 3), boxes_xyxy (N, 4) float64 in pixels, labels (N,) int64 into NAMES; 1 <= N <= 9."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = draw_ground(rng, image_size)
    num_objects = int(rng.integers(2, 10))
    labels: list[int] = []
    boxes: list[np.ndarray] = []
    visible: list[np.ndarray] = []  # the visible part of each object, (S, S) in 0..1
    areas: list[float] = []
    for _ in range(8 * num_objects):  # attempts
        if len(labels) == num_objects:
            break
        label = int(rng.integers(len(NAMES)))
        rings = place(outline(NAMES[label]), rng, image_size)
        mask, complete = rasterize(rings, image_size)
        remaining = [v * (1 - mask) for v in visible]
        if mask.sum() < 0.6 * complete or any(r.sum() < MIN_VISIBLE * a for r, a in zip(remaining, areas)):
            continue
        canvas = paint(canvas, mask, rng)
        points = np.concatenate(rings)
        boxes.append(np.concatenate((points.min(0), points.max(0))).clip(0, image_size))
        labels.append(label)
        visible, areas = [*remaining, mask], [*areas, complete]
    return develop(canvas, rng), np.array(boxes).reshape(-1, 4), np.array(labels, dtype=np.int64)


# ---------------------------------------------------------------- outlines


def outline(name: str) -> list[np.ndarray]:
    """Closed curves (n, 2) of a shape about as large as the unit circle. Inside two curves is outside the shape."""
    if name == "disk":
        return [_polygon(48)]
    if name == "ring":
        return [_polygon(48), 0.55 * _polygon(48)]
    if name == "square":
        return [_polygon(4)]
    if name == "triangle":
        return [_polygon(3)]
    if name == "hexagon":
        return [_polygon(6)]
    if name == "star":
        radius = np.tile([1.0, 0.42], 5)[:, None]
        return [radius * _polygon(10)]
    if name == "cross":
        a, b = 0.33, 0.95
        arm = np.array([(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b)])
        return [np.concatenate((arm, -arm))]
    if name == "heart":
        t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack((16 * np.sin(t) ** 3, -y - 2), axis=1) / 15]
    raise ValueError(f"no shape {name!r}")


def _polygon(sides: int) -> np.ndarray:
    angle = np.arange(sides) * (2 * math.pi / sides) - math.pi / 2
    return np.stack((np.cos(angle), np.sin(angle)), axis=1)


def place(rings: list[np.ndarray], rng: np.random.Generator, image_size: int) -> list[np.ndarray]:
    """The outline in pixels: stretched, turned, scaled and shifted into the picture."""
    radius = image_size * 0.04 * (5.5 ** rng.random())  # log-uniform: small objects are as frequent as large ones
    stretch = np.exp(rng.uniform(-0.22, 0.22))
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.diag([stretch, 1 / stretch]) @ turn * radius
    center = rng.uniform(0.03, 0.97, 2) * image_size
    return [ring @ matrix.T + center for ring in rings]


def rasterize(rings: list[np.ndarray], image_size: int) -> tuple[np.ndarray, float]:
    """Coverage of each pixel (S, S) in 0..1, and the area in pixels, including parts outside of the picture."""
    low = np.floor(np.concatenate(rings).min(0)).astype(int)
    high = np.ceil(np.concatenate(rings).max(0)).astype(int)
    width, height = (int(v) for v in high - low)
    inside = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), bool)
    for ring in rings:
        layer = Image.new("1", inside.shape[::-1])
        corners = ((ring - low) * SUPERSAMPLING - 0.5).ravel().tolist()  # Pillow counts from pixel centers
        ImageDraw.Draw(layer).polygon(corners, fill=1)
        inside ^= np.asarray(layer)
    coverage = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean((1, 3))
    mask = np.zeros((image_size, image_size))
    x1, y1 = np.maximum(low, 0)
    x2, y2 = np.minimum(high, image_size)
    if x1 < x2 and y1 < y2:
        mask[y1:y2, x1:x2] = coverage[y1 - low[1] : y2 - low[1], x1 - low[0] : x2 - low[0]]
    return mask, float(coverage.sum())


# ---------------------------------------------------------------- colour


def draw_ground(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """float (S, S, 3): a texture, noise at several frequencies, and lines and blobs as distraction."""
    canvas = texture(rng, (image_size, image_size), image_size, draw_colour(rng), rng.uniform(0.0, 0.5))
    for cells in (3, 7, 17, 41):
        tint = rng.uniform(0, 1) * rng.normal(size=3) * 0.5 + 0.7
        canvas = canvas + (rng.uniform(0.0, 0.1) * smooth_noise(rng, (image_size, image_size), cells))[..., None] * tint
    for _ in range(int(rng.integers(2, 8))):
        mask = blob(rng, image_size) if rng.random() < 0.4 else scribble(rng, image_size)
        canvas = paint(canvas, mask, rng)
    return canvas


def draw_colour(rng: np.random.Generator) -> np.ndarray:
    """RGB (3,) in 0..1, from muted to vivid."""
    hue = rng.random() * 6
    saturation, value = rng.beta(1.6, 1.6), rng.uniform(0.2, 0.98)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - ramp))


def texture(
    rng: np.random.Generator, shape: tuple[int, int], image_size: int, colour: np.ndarray, strength: float
) -> np.ndarray:
    """float (h, w, 3) around a colour: plain, a ramp, stripes, a checkerboard or blotches, towards a second colour."""
    y, x = np.mgrid[: shape[0], : shape[1]] / image_size
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    frequency, phase = rng.uniform(3, 22), rng.uniform(0, 2 * math.pi)
    kind = rng.integers(5)
    if kind == 0:
        amount = np.zeros_like(x)
    elif kind == 1:
        amount = along - along.min()
    elif kind == 2:
        amount = 0.5 + 0.5 * np.sin(2 * math.pi * frequency * along + phase)
    elif kind == 3:
        waves = np.sin(2 * math.pi * frequency * along + phase) * np.sin(2 * math.pi * frequency * across + phase)
        amount = 0.5 + 0.5 * np.clip(3 * waves, -1, 1)
    else:
        amount = np.clip(0.5 + smooth_noise(rng, shape, 2 + int(rng.integers(6, 30) * max(shape) / image_size)), 0, 1)
    return colour + (strength * amount)[..., None] * (draw_colour(rng) - colour)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """(h, w) of mean about 0 and deviation below 1, with about `cells` bumps along a side."""
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC), dtype=np.float64)


def paint(canvas: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The canvas with a textured layer on the mask. Its contrast to the ground varies, but never vanishes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return canvas
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    ground, alpha = canvas[window], mask[window][..., None]
    behind = (ground * alpha).sum((0, 1)) / alpha.sum()  # mean colour (3,)
    colour = draw_colour(rng)
    least = rng.uniform(0.16, 0.4)
    if np.abs(colour - behind).max() < least:  # push it away from the ground, darker on bright and brighter on dark
        colour = behind + np.where(behind.mean() > 0.5, -1, 1) * least * rng.uniform(0.8, 1.2, 3)
    layer = texture(rng, alpha.shape[:2], len(canvas), colour, rng.uniform(0.0, 0.45))
    painted = canvas.copy()
    painted[window] += alpha * (layer - ground)
    return painted


def blob(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """An irregular soft spot (S, S)."""
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    radius = image_size * rng.uniform(0.03, 0.16) * np.ones(40)
    for k in range(2, 6):
        radius *= 1 + rng.uniform(0, 0.3) * np.sin(k * angle + rng.uniform(0, 2 * math.pi))
    center = rng.uniform(0, 1, 2) * image_size
    mask, _ = rasterize([np.stack((np.cos(angle), np.sin(angle)), 1) * radius[:, None] + center], image_size)
    soft = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 5)))
    return rng.uniform(0.4, 0.9) * np.asarray(soft) / 255


def scribble(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """A line of one to five strokes (S, S)."""
    points = rng.uniform(-0.1, 1.1, 2) + np.cumsum(rng.normal(0, 0.25, (int(rng.integers(2, 7)), 2)), axis=0)
    layer = Image.new("L", (2 * image_size, 2 * image_size))
    width = max(2, round(image_size * rng.uniform(0.012, 0.05)))
    ImageDraw.Draw(layer).line((points * 2 * image_size).ravel().tolist(), fill=255, width=width, joint="curve")
    return rng.uniform(0.5, 1.0) * np.asarray(layer.reduce(2)) / 255


def develop(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float (S, S, 3) -> uint8, with the faults of a cheap camera: uneven light, a little blur, noise."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = rng.uniform(0.75, 1.15) + rng.uniform(0, 0.5) * (x * math.cos(angle) + y * math.sin(angle))
    sharp = Image.fromarray((np.clip(canvas * light[..., None], 0, 1) * 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.1) * size / 160)), dtype=np.float64)
    noisy = blurred + rng.normal(size=canvas.shape) * rng.uniform(1, 14)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    run_script(main)
