"""datasets.images: every mode, every EXIF orientation, every class of broken file."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import images
from datasets.images import (
    decode_image,
    exif_orientation,
    find_picture,
    pillow_pixels,
    read_header,
    read_image,
    read_size,
    turn_boxes,
)
from errors import UserError

HEIGHT, WIDTH = 40, 64
BOX = (8, 4, 40, 20)  # in stored pixels: white on black


def stored_pixels() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return pixels


def save_with_orientation(path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored_pixels()).save(path, exif=exif.tobytes())


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_and_boxes_turn_together(tmp_path, orientation, suffix):
    path = tmp_path / f"turned{suffix}"
    save_with_orientation(path, orientation)
    picture = read_image(path)
    assert read_header(path) == (WIDTH, HEIGHT, orientation)
    assert read_size(path) == (picture.shape[1], picture.shape[0])
    box = turn_boxes(np.array([BOX], dtype=float), orientation, WIDTH, HEIGHT)[0]
    ys, xs = np.nonzero(picture[:, :, 0] > 128)
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=1)


def test_orientations_agree_with_pillow(tmp_path):
    from PIL import ImageOps

    for orientation in range(1, 9):
        save_with_orientation(tmp_path / "a.png", orientation)
        with Image.open(tmp_path / "a.png") as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_turning_keeps_corners_in_order_and_takes_no_boxes():
    boxes = np.array([[1.0, 2, 30, 4], [0, 0, 64, 40]])
    for orientation in range(1, 9):
        turned = turn_boxes(boxes, orientation, WIDTH, HEIGHT)
        assert (turned[:, 2:] > turned[:, :2]).all()
        full = [0, 0, HEIGHT, WIDTH] if orientation >= 5 else [0, 0, WIDTH, HEIGHT]
        np.testing.assert_array_equal(turned[1], full)
        assert turn_boxes(np.zeros((0, 4)), orientation, WIDTH, HEIGHT).shape == (0, 4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_block_by_hand(order):
    def block(value, kind=3, count=1, offset=8):
        mark = b"II*\x00" if order == "<" else b"MM\x00*"
        field = struct.pack(order + images.INTEGERS.get(kind, "H"), value).ljust(4, b"\0")
        rows = struct.pack(order + "HHII", 0x010F, 2, 4, 0) + struct.pack(order + "HHI", 0x0112, kind, count) + field
        return mark + struct.pack(order + "I", offset) + struct.pack(order + "H", 2) + rows

    assert exif_orientation(block(6)) == 6
    assert exif_orientation(b"Exif\x00\x00" + block(8)) == 8
    for kind in images.INTEGERS:  # a LONG, as some cameras write it, is the same number
        assert exif_orientation(block(6, kind=kind)) == 6
    for broken in (block(0), block(9), block(6, kind=5), block(6, count=2), block(6)[:20], block(6, offset=4_000_000)):
        assert exif_orientation(broken) == 1
    assert exif_orientation(b"") == exif_orientation(b"garbage") == 1


def test_the_bytes_of_a_file_are_read_once(tmp_path):
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("needs the system's count of bytes that a process has read")
    pixels = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    for suffix in (".png", ".bmp", ".jpg"):
        path = tmp_path / f"noise{suffix}"
        Image.fromarray(pixels).save(path)
        before = int(counters.read_text().split()[1])  # rchar
        read_image(path)
        read = int(counters.read_text().split()[1]) - before
        assert path.stat().st_size <= read < 1.5 * path.stat().st_size, suffix


def test_modes(tmp_path):
    grey = np.arange(HEIGHT * WIDTH, dtype=np.int64).reshape(HEIGHT, WIDTH) % 256
    as_rgb = np.repeat(grey[:, :, None], 3, axis=2)

    def round_trip(image, name="x.png"):
        image.save(tmp_path / name)
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 3) and pixels.flags.c_contiguous
        return pixels

    grey8 = Image.fromarray(grey.astype(np.uint8))
    np.testing.assert_array_equal(round_trip(grey8), as_rgb)
    np.testing.assert_array_equal(round_trip(Image.fromarray((grey * 257).astype(np.uint16))), as_rgb)  # 16-bit
    np.testing.assert_array_equal(round_trip(Image.fromarray((grey * 256 + 255).astype(np.uint16))), as_rgb)
    bits = Image.fromarray(grey.astype(np.uint8)).point(lambda value: 255 * (value > 127)).convert("1")
    np.testing.assert_array_equal(round_trip(bits), 255 * (as_rgb > 127))
    red = Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 10))
    for image in (red, red.convert("P", palette=Image.Palette.ADAPTIVE), red.convert("RGBA")):
        assert (round_trip(image) == (200, 30, 10)).all()
    transparent = Image.new("RGBA", (WIDTH, HEIGHT), (200, 30, 10, 0))
    assert (round_trip(transparent) == (200, 30, 10)).all()  # alpha is cut off, not blended
    np.testing.assert_array_equal(round_trip(grey8.convert("LA")), as_rgb)
    cmyk = round_trip(Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)), "x.jpg")
    assert abs(cmyk.astype(int) - (255, 0, 0)).max() < 12


def test_a_png_may_hold_exif_after_its_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored_pixels()).save(tmp_path / "a.png", exif=exif.tobytes())
    data = (tmp_path / "a.png").read_bytes()
    chunks, place = [data[:8]], 8
    while place < len(data):
        length = 12 + struct.unpack(">I", data[place : place + 4])[0]
        chunks.append(data[place : place + length])
        place += length
    late = sorted(chunks[1:-1], key=lambda chunk: chunk[4:8] == b"eXIf")
    assert late[-1][4:8] == b"eXIf"
    turned = b"".join([chunks[0], *late, chunks[-1]])
    (tmp_path / "b.png").write_bytes(turned)
    assert read_header(tmp_path / "b.png") == (WIDTH, HEIGHT, 6) and read_size(tmp_path / "b.png") == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(decode_image(turned, "b"), read_image(tmp_path / "a.png"))
    cut = turned[:-20]
    (tmp_path / "b.png").write_bytes(cut[:-1])
    assert read_size(tmp_path / "b.png") in ((HEIGHT, WIDTH), (WIDTH, HEIGHT))  # a broken end is no crash


def grey_tiff(grey: np.ndarray, bits: int, photometric: int, sample_format: int) -> bytes:
    """An uncompressed TIFF of one strip. grey (H, W), W even. At 12 bits two pixels take three bytes."""
    height, width = grey.shape
    if bits == 12:
        a, b = grey.reshape(-1, 2).T
        data = np.stack((a >> 4, (a & 15) << 4 | b >> 8, b & 255), 1).astype(np.uint8).tobytes()
    else:
        data = grey.astype(f"<u{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    rows = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {339: sample_format}).items()]
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)


@pytest.mark.parametrize(
    "bits, photometric, factor, faulty",
    [
        (16, 1, 257, False),
        (16, 0, 257, False),
        (12, 1, 16, False),
        (16, 1, 1, True),
        (16, 1, 16, False),
        (32, 1, 999, True),
    ],
)
def test_grey_of_many_bits(tmp_path, bits, photometric, factor, faulty):
    """White may be 0, 12 bits are not 16, and what would be black or cut is refused."""
    grey = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256
    stored = grey * factor
    (tmp_path / "a.tif").write_bytes(grey_tiff(stored if photometric else 65535 - stored, bits, photometric, 1))
    if faulty:
        with pytest.raises(UserError, match=r"its 16-bit pixels are 0 to 255|integers from 0 to 254745"):
            read_image(tmp_path / "a.tif")
        return
    expected = stored >> (bits - 8)  # of which 12 bits in 16 are dark, as they may be meant
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.repeat(expected[:, :, None], 3, 2))
    if bits == 16:
        (tmp_path / "a.tif").write_bytes(grey_tiff(stored >> 1, bits, 1, 2))
        with pytest.raises(UserError, match="without a sign"):
            read_image(tmp_path / "a.tif")


def test_tiff(tmp_path):
    """What becomes RGB how is the same as for PNG; floats are refused."""
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256).astype(np.uint16)
    for image in (
        Image.fromarray(stored_pixels()),
        Image.fromarray(grey * 257),
        Image.fromarray(grey.astype(np.uint8)),
    ):
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate"):
            image.save(tmp_path / "a.tif", compression=compression)
            image.save(tmp_path / "a.png")
            np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.png"))
    pages = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ((255, 0, 0), (0, 255, 0))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert (read_image(tmp_path / "pages.tif") == (255, 0, 0)).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floats"):
        read_image(tmp_path / "float.tif")


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ((255, 0, 0), (0, 255, 0))]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (read_image(tmp_path / name) == (255, 0, 0)).all()


def test_one_pixel_high(tmp_path):
    Image.new("RGB", (300, 1)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == (1, 300, 3)


def test_wrong_suffix_is_read_by_content(tmp_path):
    Image.fromarray(stored_pixels()).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), stored_pixels())


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is that large; its pixel data is missing."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = [
    (b"", "empty file"),
    (b"<!DOCTYPE html><html>404</html>", "HTML"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    (b"\x00" * 100, "not a picture"),
    (b"GIF89a" + b"\x00" * 100, "in GIF format"),
    (b"\x00\x00\x00\x18ftypheic" + b"\x00" * 100, "in HEIC format"),
    (b"\x00\x00\x00\x18ftypmif1" + b"\x00" * 100, "in HEIC format"),
    (b"\x00\x00\x00\x20ftypavif" + b"\x00" * 100, "in AVIF format"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\x00" * 100, "in JPEG 2000 format"),
    (b"\xff\x0a" + b"\x00" * 100, "in JPEG XL format"),
    (b"\xff\xd8\xff\xe0", "truncated or broken header"),
    (png_of_size(8001, 8000), "too large"),
    (png_of_size(20000, 20000), "too large"),
    (png_of_size(30, 30), "picture"),
]


@pytest.mark.parametrize("content, words", BROKEN)
def test_broken_files_are_named_and_classed(tmp_path, content, words):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(UserError, match=f"{tmp_path}: a folder|not a picture"):
        read_size(tmp_path)


@pytest.mark.parametrize("format", images.FORMATS)
def test_every_cut_is_refused(tmp_path, format):
    """A file cut in its pixel data is refused, never filled up with grey."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=format)
    data, path = buffer.getvalue(), tmp_path / "cut"
    for cut in np.linspace(0, 0.97 * len(data), 40).astype(int):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            read_image(path)


def test_flipped_bytes_never_crash(tmp_path):
    rng = np.random.default_rng(1)
    for format in images.FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(stored_pixels()).save(buffer, format=format)
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            (tmp_path / "flipped").write_bytes(data)
            try:
                pixels = read_image(tmp_path / "flipped")
            except UserError:
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_pixels_of_a_png_with_a_wrong_checksum_are_refused(tmp_path):
    """Pillow decodes them, and may give other pixels."""
    Image.fromarray(stored_pixels()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[data.rfind(b"IEND") - 5] ^= 1  # the last byte of the checksum before the last chunk
    (tmp_path / "a.png").write_bytes(data)
    for read in (lambda: read_image(tmp_path / "a.png"), lambda: decode_image(bytes(data), "a.png")):
        with pytest.raises(UserError, match=r"a\.png: broken picture \(the checksum of its pixels does not match\)"):
            read()


def test_bytes_after_the_end_of_a_png_are_not_its_pixels(tmp_path):
    """Such as the rest of a longer file that was written over."""
    Image.fromarray(stored_pixels()).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data + (4).to_bytes(4, "big") + b"IDATrest" + bytes(4))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.png"))


def test_find_picture(tmp_path):
    for name in ("a.JPG", "b.png", "c.d.jpeg"):
        (tmp_path / name).touch()
    assert find_picture(tmp_path, "a") == tmp_path / "a.JPG"
    assert find_picture(tmp_path, "b") == tmp_path / "b.png"
    assert find_picture(tmp_path, "c.d") == tmp_path / "c.d.jpeg"
    assert find_picture(tmp_path, "c") is None


def test_odd_photos(shared_data):
    odd = shared_data / "photos" / "odd"
    upright = read_image(odd / "hopper.jpg").astype(int)
    for orientation in (3, 6):
        path = odd / f"hopper_orientation_{orientation}.jpg"
        assert read_header(path)[2] == orientation
        assert abs(read_image(path).astype(int) - upright).mean() < 12  # the same portrait, compressed again
    grey = read_image(odd / "hopper_gray.jpg")
    assert (grey[:, :, 0] == grey[:, :, 1]).all() and abs(grey.astype(int).mean() - upright.mean()) < 6
    with Image.open(odd / "pil_sample_cmyk.jpg") as image:
        assert image.mode == "CMYK"
    assert read_image(odd / "pil_sample_cmyk.jpg").shape == (100, 100, 3)


def test_grey_photos_of_the_datasets(shared_data):
    for name in ("coco128/images/train2017/000000000086.jpg", "raccoon/images/raccoon-150.jpg"):
        with Image.open(shared_data / name) as image:
            assert image.mode == "L"
        assert read_image(shared_data / name).shape[2] == 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_bytes_decode_as_the_file_does(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_with_orientation(path, 6)
    np.testing.assert_array_equal(decode_image(path.read_bytes(), "upload"), read_image(path))


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "upload: empty file, expected a JPEG"),
        (b"<html>not found", "upload: HTML or XML text"),
        (b"\x89PNG\r\n\x1a\n", "upload: truncated or broken header"),
        (b"%PDF-1.7 and more", "upload: not a picture"),
    ],
)
def test_bytes_that_are_no_picture(data, expected):
    with pytest.raises(UserError, match=expected):
        decode_image(data, "upload")


def test_bytes_of_a_truncated_and_of_a_large_picture(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    with pytest.raises(UserError, match="upload: truncated picture"):
        decode_image(file.getvalue()[:-200], "upload")
    with pytest.raises(UserError, match=r"upload: too large, 64 x 40, expected a picture of at most 2,559 pixels"):
        decode_image(file.getvalue(), "upload", max_pixels=2559)
    assert decode_image(file.getvalue(), "upload", max_pixels=2560).shape == (40, 64, 3)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_of_pillow_is_turned_as_its_file(tmp_path, suffix, orientation):
    path = tmp_path / f"turned{suffix}"
    save_with_orientation(path, orientation)
    for opened in (Image.open(path), Image.open(path).copy(), Image.open(path).convert("RGB")):
        np.testing.assert_array_equal(pillow_pixels(opened), read_image(path))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_neither_a_file_nor_its_image_is_turned_by_xmp(tmp_path, suffix):
    path = tmp_path / f"xmp{suffix}"
    Image.fromarray(stored_pixels()).save(path, xmp=XMP)
    assert Image.open(path).getexif()[0x0112] == 6  # Pillow does
    np.testing.assert_array_equal(pillow_pixels(Image.open(path)), read_image(path))


def test_an_exif_tag_of_one_byte_turns_a_file_and_its_image(tmp_path):
    row = struct.pack("<HHIB3x", 0x0112, 1, 1, 6)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + row + bytes(4)
    Image.fromarray(stored_pixels()).save(tmp_path / "byte.jpg", exif=block)
    assert read_image(tmp_path / "byte.jpg").shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(pillow_pixels(Image.open(tmp_path / "byte.jpg")), read_image(tmp_path / "byte.jpg"))
