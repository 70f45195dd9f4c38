"""C1 and C2: pictures cut short and with flipped bits, in every format that Pillow writes, and in every mode.

A cut is refused, or gives the pixels of the whole file. So is a flipped bit in a PNG, whose chunks have checksums. The
other formats have none: the pixels of such a file may be others, of a picture all the same.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from datasets.images import FORMATS, decode_image, read_header, read_image, read_size
from errors import UserError
from tests.faults.matrix import Case, Outcome, refusal

CUTS, FLIPS = 160, 240  # of each format that is read
HEIGHT, WIDTH = 40, 56


def pixels() -> np.ndarray:
    """(HEIGHT, WIDTH, 3): smooth, with some noise."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack((2 * x + y, 4 * y, 255 - 3 * x), 2)
    return (smooth + np.random.default_rng(0).integers(0, 24, smooth.shape)).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def read_both(path: Path) -> np.ndarray:
    """The pixels, by each of the functions that read them, which agree: from a file, from its bytes, the size."""
    found = read_image(path)
    assert np.array_equal(found, decode_image(path.read_bytes(), path.name))
    assert read_size(path) == (found.shape[1], found.shape[0]) and read_header(path)[2] in range(1, 9)
    return found


def damaged(folder: Path) -> Iterator[Case]:
    path = folder / "damaged"

    def run(data: bytes, whole: np.ndarray, may_differ: bool) -> Outcome:
        path.write_bytes(data)
        try:
            found = read_image(path)
        except UserError:
            return refusal(lambda: read_image(path), path, "expected a|truncated|broken|too large")
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        if np.array_equal(found, whole):
            return "correct"
        assert may_differ, "read as another picture"
        return "unseen"

    image = Image.fromarray(pixels())
    for format in FORMATS:
        data, rng = encode(image, format), np.random.default_rng(len(format))
        (folder / "whole").write_bytes(data)
        whole = read_both(folder / "whole")
        for number, length in enumerate(np.linspace(0, len(data) - 1, CUTS).astype(int)):
            yield Case("C1", f"{format}-cut-{number}", lambda d=data[:length], w=whole: run(d, w, False), 1)
        for number in range(FLIPS):
            place, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
            flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            run_one = lambda d=flipped, w=whole, m=format != "PNG": run(d, w, m)
            yield Case("C1", f"{format}-flip-{number}", run_one, 1)


def formats(folder: Path) -> Iterator[Case]:
    """A picture in every format that Pillow writes: those that are read are right, the others refused by one line."""
    Image.init()
    for format in sorted(Image.SAVE):
        data = None
        for mode in ("RGB", "L", "1", "P"):
            try:
                with warnings.catch_warnings(action="ignore"):
                    data = encode(Image.fromarray(pixels()).convert(mode), format)
                break
            except Exception:  # a mode, or a library, that this format or this Pillow does not have
                continue
        if data is not None:
            yield Case("C1", f"format-{format}", lambda d=data: one_format(folder / "picture", d), 1)


def one_format(path: Path, data: bytes) -> Outcome:
    path.write_bytes(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            expected = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        return refusal(lambda: read_image(path), path, "expected a JPEG, PNG, BMP, WebP or TIFF")
    assert np.array_equal(read_both(path), expected)
    return "correct"


def modes(folder: Path) -> Iterator[Case]:
    """What becomes RGB, how it is turned, and pictures of odd sizes and under other names."""
    rgb = Image.fromarray(pixels())
    grey = np.asarray(rgb.convert("L"))
    thrice = lambda values: np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, 2)
    see_through = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 7)))
    bits = rgb.convert("1")
    rows: dict[str, tuple[bytes, np.ndarray]] = {
        "L": (encode(rgb.convert("L"), "PNG"), thrice(grey)),
        "LA": (encode(Image.merge("LA", (rgb.convert("L"), Image.new("L", rgb.size, 9))), "PNG"), thrice(grey)),
        "P": (encode(rgb.convert("P"), "PNG"), np.asarray(rgb.convert("P").convert("RGB"))),
        "RGBA": (encode(see_through, "PNG"), pixels()),
        "RGBA in WebP": (encode(see_through, "WEBP", lossless=True, exact=True), pixels()),
        "1-bit": (encode(bits, "PNG"), thrice(255 * np.asarray(bits))),
        "1-bit TIFF": (encode(bits, "TIFF", compression="group4"), thrice(255 * np.asarray(bits))),
        "16-bit": (encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), thrice(grey)),
        "16-bit TIFF": (encode(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), thrice(grey)),
        "CMYK": (encode(rgb.convert("CMYK"), "TIFF"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "APNG": (encode(rgb, "PNG", save_all=True, append_images=[ImageOps.invert(rgb)]), pixels()),
        "animated WebP": (
            encode(rgb, "WEBP", save_all=True, append_images=[ImageOps.invert(rgb)], lossless=True), pixels()
        ),
        "pages": (encode(rgb, "TIFF", save_all=True, append_images=[ImageOps.invert(rgb)]), pixels()),
        "one row": (encode(rgb.crop((0, 0, WIDTH, 1)), "PNG"), pixels()[:1]),
        "one column": (encode(rgb.crop((0, 0, 1, HEIGHT)), "BMP"), pixels()[:, :1]),
        "one pixel": (encode(rgb.crop((0, 0, 1, 1)), "TIFF"), pixels()[:1, :1]),
    }  # fmt: skip
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("PNG", "TIFF"):
            data = encode(rgb, format, exif=exif.tobytes())
            with Image.open(io.BytesIO(data)) as image:
                rows[f"{format} turned {orientation}"] = (data, np.asarray(ImageOps.exif_transpose(image)))

    def right(name: str, data: bytes, expected: np.ndarray) -> Outcome:
        path = folder / f"{name}.jpg"  # a wrong suffix: the content decides
        path.write_bytes(data)
        assert np.array_equal(read_both(path), expected)
        return "correct"

    for name, row in rows.items():
        yield Case("C2", name, lambda n=name, r=row: right(n, *r), 1)
    from tests.datasets.test_images import BROKEN

    for number, (data, words) in enumerate(BROKEN):
        yield Case("C2", f"broken {number} {words}", broken(folder / f"broken_{number}.jpg", data, words), 1)
    floats = encode(Image.fromarray(grey.astype(np.float32)), "TIFF")
    yield Case("C2", "floats", broken(folder / "floats.tif", floats, "floats"), 1)


def broken(path: Path, data: bytes, words: str) -> Callable[[], Outcome]:
    def run() -> Outcome:
        path.write_bytes(data)
        with_bytes = refusal(lambda: decode_image(data, path.name), path.name, words)
        return refusal(lambda: read_image(path), path, words) if with_bytes else "refused"

    return run
