"""Little videos for tests, made with PyAV from drawn frames."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 160, 96


def moving_red(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 (height, width, 3): a red rectangle 40 x 32, two pixels further to the right in each frame, on noise."""
    pixels = np.random.default_rng(number).integers(150, 200, (height, width, 3)).astype(np.uint8)
    pixels[16:48, 8 + 2 * number : 48 + 2 * number] = (255, 0, 0)
    return pixels


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    ticks: Sequence[int] | None = None,
    rate: Fraction = Fraction(25),
    time_base: Fraction | None = None,
    encoder: str = "mpeg4",
    degrees: int = 0,
    pixel_shape: Fraction = Fraction(1),
    sound: bool = False,
) -> Path:
    """ticks: when frames are shown, in units of time_base (1 / rate). degrees: of the display matrix."""
    time_base = time_base or 1 / rate
    with av.open(f"file:{path}", "w") as container:
        height, width = frames[0].shape[:2]
        stream = container.add_stream(encoder, rate=rate, options={"qscale": "2"} if encoder == "mpeg4" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        stream.codec_context.sample_aspect_ratio = pixel_shape
        if degrees:
            stream.set_display_rotation(degrees)
        audio = container.add_stream("aac", rate=44100) if sound else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = ticks[number] if ticks else number, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 44100, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return path


def packet_places(path: Path) -> list[tuple[int, int]]:
    """(first byte, bytes) of each picture in the file, in the order they are stored."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def damage(path: Path, packet: int) -> None:
    """Overwrite one stored picture but for its first bytes."""
    data = bytearray(path.read_bytes())
    start, size = packet_places(path)[packet]
    data[start + 8 : start + size] = bytes([0x55]) * (size - 8)
    path.write_bytes(data)
