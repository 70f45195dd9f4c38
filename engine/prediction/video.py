"""Video in and out, through PyAV: frames upright and with their times, the sound left behind.

Reading takes containers of video alone: a playlist named *.mp4, which would have other files or addresses opened, is
no video here. A frame that cannot be decoded, or that its decoder calls corrupt, is counted and skipped; the frames
after it, which are predicted from it, may still show traces.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.images import MAX_PIXELS
from engine.runtime.run_folder import DISK_EXIT_CODE
from errors import UserError, require

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv")
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,m4v,h264,hevc,ivf"  # what may be opened
CAMERA_FORMAT, CAMERA_PATH = "v4l2", "/dev/video{}"
ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20"}, "mpeg4": {"qscale": "3"}}  # the first that exists is taken
MPEG4_MOST_TICKS = 65535  # a second, by the standard (ISO/IEC 14496-2, vop_time_increment_resolution)
USUAL_FRAME_RATE = Fraction(25)  # where a stream says nothing of its rate
BT709, LIMITED_RANGE = 1, 1  # of colour matrix, primaries and transfer, and of the range (ITU-T H.273)


def require_av():
    return require("av", "video", "reading and writing video")


@dataclass(frozen=True)
class Frame:
    """pixels: upright uint8 (H, W, 3) RGB. number: of the frames, from 0, broken ones counted.

    ticks: when it is shown, in units of VideoReader.time_base since the first frame; strictly increasing.
    """

    pixels: np.ndarray
    number: int
    ticks: int
    seconds: float


class VideoReader:
    """The frames of a video file or a camera, one after another; a context, and an iterator that runs once.

    width, height: of the first frame, upright. frame_rate: mean frames per second, a Fraction. frame_count: what the
    header says, 0 where it says nothing (a camera). has_sound, is_turned: whether there is sound, and a rotation.
    pixel_shape: width of a pixel by its height. broken: frames skipped until now, first_fault: the first of them.

    UserError: the file is no video, a frame is too large, no frame at all can be decoded, or there is no such camera.
    """

    def __init__(self, path: Path | None = None, *, camera: int | None = None) -> None:
        self.av = require_av()
        self.name = str(path) if camera is None else f"webcam:{camera}"
        self.broken, self.first_fault = 0, ""
        self._container = self._open(path) if camera is None else self._open_camera(camera)
        try:
            self._stream = self._find_stream()
            self._good, self._last, self._offset = 0, None, 0
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
        except BaseException:
            self.close()
            raise
        if self._first is None:
            self.close()
            fault = f" ({self.first_fault})" if self.first_fault else ""
            raise UserError(f"{self.name}: no frame of it can be decoded{fault}, expected a video")
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

    def _open(self, path: Path) -> "av.container.InputContainer":
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        try:
            return self.av.open(f"file:{path}", options=options)  # "file:", or a name such as a:b.mp4 is a protocol
        except self.av.FFmpegError as error:
            raise UserError(f"{path}: {fault_words(error)}, expected a video ({', '.join(SUFFIXES)})") from None

    def _open_camera(self, number: int) -> "av.container.InputContainer":
        device = CAMERA_PATH.format(number)
        try:
            return self.av.open(device, format=CAMERA_FORMAT)
        except self.av.FFmpegError as error:
            raise UserError(f"webcam:{number}: {device}: {fault_words(error)}, expected a camera") from None
        except ValueError:
            expected = "expected one with Video4Linux (v4l2), through which webcams are read"
            raise UserError(f"webcam:{number}: this system is {sys.platform}, {expected}") from None

    def _find_stream(self) -> "av.VideoStream":
        stream = self._container.streams.best("video")
        if stream is None:
            raise UserError(f"{self.name}: has no pictures in it, expected a video")
        codec = stream.codec_context
        if codec is None:
            raise UserError(f"{self.name}: found a codec that PyAV cannot decode, expected a video")
        if codec.width * codec.height > MAX_PIXELS:
            found = f"found frames of {codec.width} x {codec.height}"
            raise UserError(f"{self.name}: {found}, expected at most {MAX_PIXELS:,} pixels")
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
                self._skip(fault_words(error))
                continue
            for frame in frames:
                # AVI holds no times of presentation; those FFmpeg makes up for frames out of order run back and forth
                ticks = self._tick(frame.dts if self._container.format.name == "avi" else frame.pts)
                if frame.is_corrupt:
                    self._skip("corrupt data")
                    continue
                yield Frame(self._upright(frame), self._good + self.broken, ticks, float(ticks * self.time_base))
                self._good += 1

    def _packets(self) -> Iterator["av.Packet | None"]:
        """The stream's packets; at the end what makes the decoder give out what it still holds."""
        try:
            yield from self._container.demux(self._stream)
        except self.av.FFmpegError as error:  # where the file itself cannot be followed any further
            self._skip(fault_words(error))
            yield None

    def _skip(self, fault: str) -> None:
        self.broken += 1
        self.first_fault = self.first_fault or fault

    def _tick(self, pts: int | None) -> int:
        """Time since the first frame. A frame without a time, or one of a clock set back, follows the one before it."""
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
        turned = turn(pixels, np.frombuffer(matrix, dtype=np.int32).reshape(3, 3))
        if turned is not pixels and not self.is_turned:
            self.is_turned = True
            if turned.shape[:2] != pixels.shape[:2]:
                self.pixel_shape = 1 / self.pixel_shape
        return turned


def turn(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A stored frame (H, W, 3) as its display matrix (3, 3) wants it shown: one of the eight ways to lay it.

    A stored point (x, y) is shown at (x, y) @ matrix[:2, :2], up to a shift (ISO/IEC 14496-12, 6.2.2). Angles between
    the quarter turns become the nearest of them. The same array comes back where nothing is to be done.
    """
    (a, b), (c, d) = matrix[:2, :2].astype(np.int64).tolist()
    is_transposed = abs(b) + abs(c) > abs(a) + abs(d)
    flip_x, flip_y = (c < 0, b < 0) if is_transposed else (a < 0, d < 0)
    if not (is_transposed or flip_x or flip_y):
        return pixels
    turned = pixels.swapaxes(0, 1) if is_transposed else pixels
    return np.ascontiguousarray(turned[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


class VideoWriter:
    """An MP4 file of frames at given times: H.264 where PyAV has libx264, else MPEG-4 part 2; no sound.

    A context: the file has its name only once it is complete. After an error there is no file; after a
    KeyboardInterrupt there is one with the frames written until then. Frames of another size than (width, height) are
    scaled to it; odd sizes get one row or column more, a copy of the last one, for the colours of H.264 are kept for
    2 x 2 pixels. Frames are shown at `ticks` x time_base; MPEG-4 rounds them to its 65,535 ticks a second.

    UserError with exit code 5 where the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        frame_rate: Fraction,
        time_base: Fraction,
        pixel_shape: Fraction = Fraction(1),
        encoder: str | None = None,
    ) -> None:
        self.av = require_av()
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp")
        self.width, self.height = width + width % 2, height + height % 2
        self.time_base, self.frames = time_base, 0
        encoder = encoder or next(name for name in ENCODERS if name in self.av.codecs_available)
        if encoder == "mpeg4" and time_base.denominator > MPEG4_MOST_TICKS:
            self.time_base = Fraction(1, MPEG4_MOST_TICKS)
        self._source_time_base, self._last = time_base, -1
        with self._faults():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self.av.open(
                str(self.temporary), "w", format="mp4", container_options={"movflags": "+faststart"}
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
        """pixels: uint8 (H, W, 3) RGB. ticks: strictly increasing, in units of the time_base given."""
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
                self.temporary.replace(self.path)
        else:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(self.av.FFmpegError, OSError):
            if hasattr(self, "_container"):
                self._container.close()
        self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (self.av.FFmpegError, OSError) as error:
            self._discard()
            raise UserError(f"{self.path}: could not be written: {fault_words(error)}", DISK_EXIT_CODE) from None


def fault_words(error: Exception) -> str:
    """FFmpeg's words for what is wrong, without the call it happened in."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
