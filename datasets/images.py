"""Pictures from disk: JPEG, PNG, BMP, WebP and TIFF of at most 64 megapixels, as upright RGB.

Conversion to RGB:

    grey (L, 1-bit)         repeated three times
    12-bit, 16-bit grey     its high 8 bits
    palette                 looked up
    alpha (LA, PA, RGBA)    dropped, not blended, as in OpenCV
    CMYK                    converted without a colour profile
    several frames, pages   the first one

EXIF orientation is applied; an orientation that is only in XMP is not read. Float and signed 16-bit pixels are refused,
grey that is all black in 8 bits, and GIF, HEIC, AVIF, JPEG 2000 and JPEG XL, by name.

Every limit is checked here and not by turning Pillow's warnings into errors: warning filters belong to the whole
process, and pictures are read in threads. A truncated file is an error; it is never filled up with grey.
"""

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from datasets.folders import spellings
from errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
SUFFIXES = (".jpg", ".png", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
UNREAD = {".gif": "GIF", ".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF", ".jp2": "JPEG 2000", ".jxl": "JPEG XL"}
PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 64_000_000
PNG_END_BYTES = 1 << 16
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # EXIF's types: byte, short, long, unsigned and signed

# Pillow's own limit is looser than ours, which is checked before any pixel is decoded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency")  # alpha is dropped on purpose
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # odd tags: either the pixels decode or they do not
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path) -> np.ndarray:
    """The upright picture, uint8 (H, W, 3) RGB, contiguous. UserError names the file and its fault."""
    image = _open(path)
    if image.format != "PNG":
        return _decode(image, path, _orientation(image, path))
    image.close()
    try:
        data = Path(path).read_bytes()  # once, for the pixels and for their checksums, which Pillow does not test
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """As read_image, for a file in memory, which is never written to disk. `name` names it in errors."""
    image = _open(name, data, max_pixels)
    return _decode(image, name, _orientation(image, data), data)


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """An image of Pillow as read_image reads its file, turned by the same rule. ValueError for pixels it refuses.

    Pillow's own exif_transpose also turns by XMP, and reads EXIF by other types.
    """
    rgb = to_rgb(image)  # loads the file: what stands behind its pixels is in `info` after that; turns a TIFF
    return _turn(rgb, exif_orientation(rgb.info.get("exif", b"")))


def _turn(rgb: Image.Image, orientation: int) -> np.ndarray:
    transpose = _TRANSPOSE.get(orientation)
    return np.array(rgb if transpose is None else rgb.transpose(transpose))


def _decode(image: Image.Image, path: str | Path, orientation: int, data: bytes = b"") -> np.ndarray:
    """The pixels in the form of read_image. Closes `image`. data: all bytes of its file; only a PNG needs them."""
    try:
        if image.format == "PNG":
            _check_png(data)
        return _turn(to_rgb(image), 1 if image.format == "TIFF" else orientation)  # Pillow turns a TIFF as it loads it
    except Exception as error:  # decoders raise any exception for bytes that are no picture
        raise UserError(f"{path}: {_decode_fault(error)}") from None
    finally:
        image.close()


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture in RGB, by the table above, with its `info`. ValueError for pixels that are refused."""
    if image.mode == "F":
        raise ValueError("its pixels are floats; expected 8 or 16 bits a channel")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    rgb = Image.fromarray(_high_bits(image)).convert("RGB")  # 16-bit grey: I;16 and its byte orders, or I
    rgb.info = image.info.copy()
    return rgb


def _high_bits(image: Image.Image) -> np.ndarray:
    """16-bit grey as uint8 (H, W). ValueError for values that are no such grey. Pillow ignores these tags of a TIFF."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, sample_format = (np.ravel(tags.get(tag, default))[0] for tag, default in ((258, 16), (339, 1)))
    grey = np.asarray(image).astype(np.int64)
    low, high = int(grey.min()), int(grey.max())
    if (bits, sample_format) == (16, 2) or low < 0 or high > 65535:
        raise ValueError(f"its pixels are integers from {low} to {high}; expected 8 or 16 bits without a sign")
    depth = min(int(bits), 16)
    if tags.get(262) == 0:  # white is zero
        grey = (1 << depth) - 1 - grey
    grey >>= depth - 8
    if 0 < high < 1 << (depth - 8):
        raise ValueError(f"its {depth}-bit pixels are {low} to {high}, one grey in 8 bits; expected their whole range")
    return grey.astype(np.uint8)


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header. UserError as in read_image."""
    width, height, orientation = read_header(path)
    return (height, width) if orientation >= 5 else (width, height)


def read_header(path: str | Path) -> tuple[int, int, int]:
    """(stored width, stored height, EXIF orientation 1..8), without decoding. UserError as in read_image."""
    with _open(path) as image:
        if isinstance(image, TiffImageFile):  # in some releases of Pillow, its size is that of the upright picture
            return int(image.tag_v2[256]), int(image.tag_v2[257]), _orientation(image, path)
        return image.width, image.height, _orientation(image, path)


def _orientation(image: Image.Image, source: str | Path | bytes) -> int:
    """EXIF orientation 1..8 of an opened picture, given by its path or its bytes, without decoding pixels."""
    if image.format == "TIFF":
        try:
            value = image.getexif().get(0x0112)  # includes XMP, by which Pillow turns a TIFF too
        except Exception:  # a broken directory of tags
            return 1
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    exif = image.info.get("exif", b"")
    if not exif and image.format == "PNG":
        exif = _png_exif(source)
    return exif_orientation(exif)


def _check_png(data: bytes) -> None:
    """ValueError for pixels whose checksum is wrong: Pillow checks those of all other chunks of a PNG file."""
    place = len(PNG_START)
    while place + 12 <= len(data) and data[place - 8 : place - 4] != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        chunk = memoryview(data)[place + 4 : place + 8 + length]
        place += 12 + length
        if (
            chunk[:4] == b"IDAT"
            and place <= len(data)
            and data[place - 4 : place] != struct.pack(">I", zlib.crc32(chunk))
        ):
            raise ValueError("the checksum of its pixels does not match")


def _png_exif(source: str | Path | bytes) -> bytes:
    """The eXIf chunk at the end of a PNG file, after its pixels; b"" if there is none.

    A chunk is its length (4 bytes, big-endian), its type (4), its data, and a checksum of the last two (4). Only the
    end of the file is searched: a large picture has hundreds of chunks before it.
    """
    if isinstance(source, bytes):
        end = source[-PNG_END_BYTES:]
    else:
        with open(source, "rb", buffering=0) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - PNG_END_BYTES))
            end = file.read()
    place = end.rfind(b"eXIf")
    while place >= 4:
        (length,) = struct.unpack_from(">I", end, place - 4)
        chunk = end[place : place + 4 + length]
        if end[place + 4 + length :][:4] == struct.pack(">I", zlib.crc32(chunk)):
            return chunk[4:]
        place = end.rfind(b"eXIf", 0, place)
    return b""


def turn_boxes(boxes_xyxy: np.ndarray, orientation: int, width: int, height: int) -> np.ndarray:
    """Boxes (N, 4) of the stored picture, of size width x height -> boxes (N, 4) of the upright picture.

    By orientation, a stored point (x, y) moves to: 1 (x, y); 2 (w - x, y); 3 (w - x, h - y); 4 (x, h - y); 5 (y, x);
    6 (h - y, x); 7 (h - y, w - x); 8 (y, w - x). (Exif 2.32, tag 0x0112.)
    """
    x, y = boxes_xyxy[:, 0::2], boxes_xyxy[:, 1::2]  # (N, 2) each
    if orientation in (2, 3, 7, 8):
        x = width - x[:, ::-1]
    if orientation in (3, 4, 6, 7):
        y = height - y[:, ::-1]
    if orientation >= 5:
        x, y = y, x
    return np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), axis=1)  # (N, 4)


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of an EXIF block, 1..8; 1 where it is missing or broken."""
    if exif.startswith(b"Exif\x00\x00"):
        exif = exif[6:]
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for row in range(count):
            row_start = start + 2 + 12 * row
            tag, kind, values = struct.unpack_from(order + "HHI", exif, row_start)
            if tag == 0x0112:
                if kind not in INTEGERS or values != 1:
                    return 1
                (value,) = struct.unpack_from(order + INTEGERS[kind], exif, row_start + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def find_picture(folder: Path, stem: str, suffixes: Iterable[str] = SUFFIXES) -> Path | None:
    """The picture `stem` in a folder, with one of the suffixes (.jpg, .JPG or .Jpg); None if there is none."""
    for name in spellings(stem):
        for suffix in suffixes:
            for spelled in (suffix, suffix.upper(), "." + suffix[1:].capitalize()):
                path = folder / (name + spelled)
                if path.is_file():
                    return path
    return None


def _open(path: str | Path, data: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open the header of a file, or of its bytes if `data` is given. UserError as in read_image."""
    try:
        image = Image.open(path if data is None else io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too large, expected a picture of at most {max_pixels:,} pixels") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a picture") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, expected a picture") from None
    except Exception as error:  # UnidentifiedImageError, or any exception of a header parser
        raise UserError(f"{path}: {_open_fault(path, error) if data is None else _fault(data[:512], error)}") from None
    if image.width * image.height > max_pixels:
        image.close()
        raise UserError(
            f"{path}: too large, {image.width} x {image.height}, expected a picture of at most {max_pixels:,} pixels"
        )
    return image


def _open_fault(path: str | Path, error: Exception) -> str:
    """Describe a file that does not open as a picture."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    return _fault(start, error)


def _fault(start: bytes, error: Exception) -> str:
    """As _open_fault, from the first bytes of a file."""
    expected = "expected a JPEG, PNG, BMP, WebP or TIFF picture"
    if not start:
        return f"empty file, {expected}"
    unread = _unread_format(start)
    if unread is not None:
        return f"a picture in {unread} format, {expected} (convert it first)"
    if start.lstrip()[:1] == b"<":
        return f"HTML or XML text, {expected} (an error page saved by a download?)"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer, {expected} (run `git lfs pull`)"
    if start.startswith((b"\xff\xd8", PNG_START, b"RIFF", b"BM", b"II*\x00", b"MM\x00*")):
        return f"truncated or broken header, {expected} ({_one_line(error)})"
    return f"not a picture (starts with {start[:8]!r}), {expected}"


def _unread_format(start: bytes) -> str | None:
    """The name of a picture format that we do not read, from a file's first bytes; None for anything else."""
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if start[4:8] == b"ftyp":  # ISO base media: the brand names the format
        return {b"avif": "AVIF", b"avis": "AVIF", b"jp2 ": "JPEG 2000", b"jxl ": "JPEG XL"}.get(
            start[8:12], "HEIC" if start[8:12] in HEIC_BRANDS else None
        )
    if start[4:12] == b"jP  \r\n\x87\n" or start[:4] == b"\xff\x4f\xff\x51":
        return "JPEG 2000"
    return "JPEG XL" if start[:2] == b"\xff\x0a" or start[4:8] == b"JXL " else None


def _decode_fault(error: Exception) -> str:
    text = _one_line(error)
    if "truncated" in text or "Truncated" in text or "ended unexpectedly" in text or isinstance(error, EOFError):
        return f"truncated picture ({text})"
    return f"broken picture ({text})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
