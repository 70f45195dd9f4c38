"""Reads and writes video with PyAV: upright frames with their times, without sound.

Only video containers are read. A playlist named *.mp4 is refused: it would open other files or addresses. A frame that
cannot be decoded, or that the decoder marks as corrupt, is counted and skipped; later frames that depend on it may
still show traces of the damage.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from datasets.images import MAX_PIXELS
from errors import DISK_EXIT_CODE, UserError, require

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv")
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,m4v,h264,hevc,ivf"  # the formats that FFmpeg may open
)
CAMERA_FORMAT, CAMERA_PATH = "v4l2", "/dev/video{}"
ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20"}, "mpeg4": {"qscale": "3"}}  # the first that exists is used
MPEG4_MOST_TICKS = 65535  # per second (ISO/IEC 14496-2, vop_time_increment_resolution)
USUAL_FRAME_RATE = Fraction(25)  # of a stream without a rate
BT709, LIMITED_RANGE = 1, 1  # colour matrix, primaries and transfer; range (ITU-T H.273)


def require_av() -> Any:
    """The module av. UserError if it is not installed."""
    return require("av", "video", "reading and writing video")


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    pixels: upright uint8 (H, W, 3) RGB. number: from 0; broken frames count. ticks: display time since the first frame
    in units of VideoReader.time_base, strictly increasing. seconds: the same in seconds.
    """

    pixels: np.ndarray
    number: int
    ticks: int
    seconds: float


class VideoReader:
    """The frames of a video file (its path, or a file in memory) or a camera: a context; an iterator that runs once.

    width, height: of the first frame, upright. frame_rate: mean frames per second, a Fraction. frame_count: from the
    header, 0 if unknown (a camera). has_sound, is_turned: whether there is sound, and whether frames were rotated.
    pixel_shape: width over height of a pixel. broken: number of frames skipped so far; first_fault: why the first was.

    UserError: the file is no video, a frame is too large, no frame can be decoded, or there is no such camera.
    """

    def __init__(
        self, path: Path | BytesIO | None = None, *, camera: int | None = None, max_pixels: int | None = None
    ) -> None:
        self.av = require_av()
        self.name = f"webcam:{camera}" if camera is not None else str(path) if isinstance(path, Path) else "the video"
        self.max_pixels = max_pixels or MAX_PIXELS
        self.broken, self.first_fault = 0, ""
        if camera is not None:
            self._container = self._open_camera(camera)
        else:
            assert path is not None  # a file or a camera
            self._container = self._open(path)
        try:
            self._stream = self._find_stream()
            self._good, self._offset = 0, 0
            self._last: int | None = None
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
        except BaseException:
            self.close()
            raise
        if self._first is None:
            self.close()
            fault = f" ({self.first_fault})" if self.first_fault else ""
            raise UserError(f"{self.name}: no frame can be decoded{fault}, expected a video")
        self.height, self.width = self._first.pixels.shape[:2]

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        if self._first is not None:
            frame, self._first = self._first, None
            yield frame
        yield from self._decoded

    def close(self) -> None:
        self._container.close()

    def _open(self, path: Path | BytesIO) -> "av.container.InputContainer":
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        source = f"file:{path}" if isinstance(path, Path) else path  # without "file:", a:b.mp4 is a protocol
        try:
            return self.av.open(source, options=options)
        except self.av.FFmpegError as error:
            raise UserError(f"{self.name}: {describe_fault(error)}, expected a video ({', '.join(SUFFIXES)})") from None

    def _open_camera(self, number: int) -> "av.container.InputContainer":
        device = CAMERA_PATH.format(number)
        try:
            return self.av.open(device, format=CAMERA_FORMAT)
        except self.av.FFmpegError as error:
            raise UserError(f"webcam:{number}: {device}: {describe_fault(error)}, expected a camera") from None
        except ValueError:
            expected = "expected one with Video4Linux (v4l2), which webcams are read through"
            raise UserError(f"webcam:{number}: this system is {sys.platform}, {expected}") from None

    def _find_stream(self) -> "av.VideoStream":
        stream = cast("av.VideoStream | None", self._container.streams.best("video"))  # "video" is its type
        if stream is None:
            raise UserError(f"{self.name}: has no video stream, expected a video")
        codec = stream.codec_context
        if codec is None:
            raise UserError(f"{self.name}: found a codec that PyAV cannot decode, expected a video")
        if codec.width * codec.height > self.max_pixels:
            found = f"found frames of {codec.width} x {codec.height}"
            raise UserError(f"{self.name}: {found}, expected at most {self.max_pixels:,} pixels")
        codec.options = {"max_pixels": str(self.max_pixels)}  # the size may change after the header
        stream.thread_type = "AUTO"
        self.frame_rate = stream.average_rate or stream.guessed_rate or USUAL_FRAME_RATE
        self.time_base = stream.time_base or 1 / self.frame_rate
        self.frame_count = stream.frames
        self.has_sound = bool(self._container.streams.audio)
        self.pixel_shape = stream.sample_aspect_ratio or Fraction(1)
        self.is_turned = False
        return stream

    def _decode(self) -> Iterator[Frame]:
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except self.av.FFmpegError as error:
                self._skip(describe_fault(error))
                continue
            for frame in frames:
                # AVI has no display times, and those that FFmpeg derives for reordered frames are not monotonic
                ticks = self._tick(frame.dts if self._container.format.name == "avi" else frame.pts)
                if frame.is_corrupt:
                    self._skip("corrupt data")
                    continue
                yield Frame(self._upright(frame), self._good + self.broken, ticks, float(ticks * self.time_base))
                self._good += 1

    def _packets(self) -> Iterator["av.Packet | None"]:
        """The packets of the stream; after an error None, which makes the decoder return the frames it still holds."""
        try:
            yield from self._container.demux(self._stream)
        except self.av.FFmpegError as error:  # the file cannot be read any further
            self._skip(describe_fault(error))
            yield None

    def _skip(self, fault: str) -> None:
        self.broken += 1
        self.first_fault = self.first_fault or fault

    def _tick(self, pts: int | None) -> int:
        """Time since the first frame. A frame without a time, or with an earlier one, follows the previous frame."""
        if self._last is None:
            self._offset, self._last = -(pts or 0), 0
        elif pts is not None and pts + self._offset > self._last:
            self._last = pts + self._offset
        else:
            self._last += max(1, round(1 / (self.frame_rate * self.time_base)))
            if pts is not None:
                self._offset = self._last - pts
        return self._last

    def _upright(self, frame: "av.VideoFrame") -> np.ndarray:
        pixels = frame.to_ndarray(format="rgb24")
        matrix = frame.side_data.get(self.av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is None:
            return pixels
        numbers = np.frombuffer(cast(memoryview, matrix), dtype=np.int32)  # PyAV's side data is a buffer
        turned = turn(pixels, numbers.reshape(3, 3))
        if turned is not pixels and not self.is_turned:
            self.is_turned = True
            if turned.shape[:2] != pixels.shape[:2]:
                self.pixel_shape = 1 / self.pixel_shape
        return turned


def turn(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate and flip a stored frame (H, W, 3) by its display matrix (3, 3).

    A stored point (x, y) is shown at (x, y) @ matrix[:2, :2], up to a shift (ISO/IEC 14496-12, 6.2.2). Angles are
    rounded to quarter turns. An upright frame is returned as it is.
    """
    (a, b), (c, d) = matrix[:2, :2].astype(np.int64).tolist()
    is_transposed = abs(b) + abs(c) > abs(a) + abs(d)
    flip_x, flip_y = (c < 0, b < 0) if is_transposed else (a < 0, d < 0)
    if not (is_transposed or flip_x or flip_y):
        return pixels
    turned = pixels.swapaxes(0, 1) if is_transposed else pixels
    return np.ascontiguousarray(turned[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


class VideoWriter:
    """Writes an MP4 file of frames at given times, without sound: H.264 if PyAV has libx264, else MPEG-4 part 2.

    A context. The file gets its name once it is complete; after an error there is no file, after a KeyboardInterrupt it
    holds the frames written so far. Frames of another size are scaled to (width, height). An odd size gets one more row
    or column, a copy of the last one, because H.264 stores colour for blocks of 2 x 2 pixels. Frames are shown at
    `ticks` x time_base; MPEG-4 rounds these times to 65,535 ticks per second.

    path: or a file in memory, which then holds the video once the context has ended.
    UserError with exit code 5 if the file cannot be written.
    """

    def __init__(
        self,
        path: Path | BytesIO,
        *,
        width: int,
        height: int,
        frame_rate: Fraction,
        time_base: Fraction,
        pixel_shape: Fraction = Fraction(1),
        encoder: str | None = None,
    ) -> None:
        self.av = require_av()
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp") if isinstance(path, Path) else None
        self.width, self.height = width + width % 2, height + height % 2
        self.time_base, self.frames = time_base, 0
        encoder = encoder or next(name for name in ENCODERS if name in self.av.codecs_available)
        if encoder == "mpeg4" and time_base.denominator > MPEG4_MOST_TICKS:
            self.time_base = Fraction(1, MPEG4_MOST_TICKS)
        self._source_time_base, self._last = time_base, -1
        with self._faults():
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self.av.open(
                path if self.temporary is None else str(self.temporary),
                "w",
                format="mp4",
                # faststart opens the file a second time, by its name
                container_options={} if self.temporary is None else {"movflags": "+faststart"},
            )
            self._stream = self._container.add_stream(encoder, rate=frame_rate, options=dict(ENCODERS[encoder]))
        codec = self._stream.codec_context
        codec.width, codec.height, codec.pix_fmt = self.width, self.height, "yuv420p"
        codec.time_base = self._stream.time_base = self.time_base
        codec.sample_aspect_ratio = pixel_shape
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, pixels: np.ndarray, ticks: int) -> None:
        """Add a frame. pixels: uint8 (H, W, 3) RGB. ticks: strictly increasing, in units of the given time_base."""
        height, width = pixels.shape[:2]
        if (width + width % 2, height + height % 2) == (self.width, self.height):
            pixels = np.pad(pixels, ((0, self.height - height), (0, self.width - width), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            self.width, self.height, "yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
        )
        self._last = max(self._last + 1, round(ticks * self._source_time_base / self.time_base))
        frame.pts, frame.time_base = self._last, self.time_base
        with self._faults():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        self.frames += 1

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.frames and (kind is None or issubclass(kind, KeyboardInterrupt)):
            with self._faults():
                for packet in self._stream.encode():
                    self._container.mux(packet)
                self._container.close()
                if self.temporary is not None:
                    self.temporary.replace(cast(Path, self.path))
        else:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(self.av.FFmpegError, OSError):
            if hasattr(self, "_container"):
                self._container.close()
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (self.av.FFmpegError, OSError) as error:
            self._discard()
            name = self.path if self.temporary is not None else "the video"
            raise UserError(f"{name}: could not be written: {describe_fault(error)}", DISK_EXIT_CODE) from None


def describe_fault(error: Exception) -> str:
    """FFmpeg's description of an error, without the call in which it happened."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
